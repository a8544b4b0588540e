"""The verbs between Hugging Face's format and ours: hf-import, hf-export, peft-export."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_slm.commands.command import EXIT_OK, Verb, parser_of, path_of, stopped_by_sigterm
from megatron_slm.errors import ConfigError

if TYPE_CHECKING:
    from megatron_slm.convert.report import Report

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def hf_import(name: str, tokens: Sequence[str]) -> int:
    """``mslm convert hf-import``: a checkpoint from a Hugging Face model."""
    parser = parser_of(
        name,
        "MODEL --output DIR [--no-logits] [--eod-token TOKEN]",
        "Make a checkpoint of a Hugging Face model (Llama, SmolLM2, Mistral, Mixtral, Qwen2, Qwen3, GPT-2; "
        "safetensors), for mslm generate and for checkpoint.pretrained_checkpoint of a run under any layout. Every "
        "tensor is compared bit by bit, and the logits with those of transformers.",
        example="mslm convert hf-import SmolLM2-135M-Instruct --output smollm2",
    )
    parser.add_argument("model", type=path_of, metavar="MODEL", help="directory with config.json and safetensors")
    parser.add_argument(
        "--output", required=True, type=path_of, metavar="DIR", help="checkpoint to write; must not exist"
    )
    parser.add_argument("--no-logits", action="store_true", help="do not compare the logits with transformers")
    parser.add_argument(
        "--eod-token", metavar="TOKEN", help="special token that ends a document (default: a known one)"
    )
    own = parser.parse_args(tokens)
    from megatron_slm.parallel.device import preload

    preload("cpu")
    from megatron_slm.convert.hf_import import import_model

    with stopped_by_sigterm():
        report = import_model(own.model, own.output, compare_logits=not own.no_logits, eod_token=own.eod_token)
    _say(report, f"{own.model} is checkpoint {own.output}")
    return EXIT_OK


def hf_export(name: str, tokens: Sequence[str]) -> int:
    """``mslm convert hf-export``: a Hugging Face model from a checkpoint."""
    parser = parser_of(
        name,
        "CHECKPOINT --output DIR [options]",
        "Make a Hugging Face model of a checkpoint of any layout: config.json, sharded safetensors, tokenizer. Every "
        "tensor is compared bit by bit, and the logits with those of transformers.",
        example="mslm convert hf-export runs/kjv --output kjv-hf",
    )
    parser.add_argument("checkpoint", type=path_of, metavar="CHECKPOINT", help="a checkpoint, or a run (its newest)")
    parser.add_argument(
        "--output", required=True, type=path_of, metavar="DIR", help="directory to write; must not exist"
    )
    parser.add_argument("--model-type", metavar="TYPE", help="of config.json (default: what the model section can be)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of every tensor (default: as it is stored)"
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default: %(default)s)")
    parser.add_argument("--ema", action="store_true", help="write the averages of the weights (train.ema_decay)")
    parser.add_argument("--no-logits", action="store_true", help="do not compare the logits with transformers")
    own = parser.parse_args(tokens)
    max_shard_bytes = size_of(own.max_shard_size)
    from megatron_slm.parallel.device import preload

    preload("cpu")
    from megatron_slm.convert.hf_export import Wish, export_model

    wish = Wish(own.model_type, own.dtype, max_shard_bytes, ema=own.ema, compare_logits=not own.no_logits)
    with stopped_by_sigterm():
        report = export_model(own.checkpoint, own.output, wish)
    _say(report, f"{own.checkpoint} is {report.model_type} model {own.output}")
    return EXIT_OK


def peft_export(name: str, tokens: Sequence[str]) -> int:
    """``mslm convert peft-export``: PEFT's files from the adapters of a checkpoint."""
    parser = parser_of(
        name,
        "CHECKPOINT --output DIR [--base MODEL]",
        "Write the adapters of a checkpoint (LoRA) as PEFT's adapter_config.json and adapter_model.safetensors. The "
        "model that they belong to is mslm convert hf-export of checkpoint.pretrained_checkpoint.",
        example="mslm convert peft-export runs/kjv-lora --output kjv-adapter --base kjv-hf",
    )
    parser.add_argument("checkpoint", type=path_of, metavar="CHECKPOINT", help="a checkpoint, or a run (its newest)")
    parser.add_argument(
        "--output", required=True, type=path_of, metavar="DIR", help="directory to write; must not exist"
    )
    parser.add_argument("--base", metavar="MODEL", help="name or directory of that model, for PEFT to find")
    own = parser.parse_args(tokens)
    from megatron_slm.parallel.device import preload

    preload("cpu")
    from megatron_slm.convert.peft_export import export_adapters

    done = export_adapters(own.checkpoint, own.output, base=own.base)
    print(f"{own.output} is {done.adapters} adapters of a {done.model_type} model, from {done.checkpoint}")
    return EXIT_OK


def size_of(text: str) -> int:
    """Bytes of ``5GB``, ``500MiB``, ``1000``.

    Raises:
        ConfigError: it is no size.
    """
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), flags=re.IGNORECASE)
    unit = UNITS.get(matched[2].upper()) if matched else None
    if matched is None or unit is None or (size := int(float(matched[1]) * unit)) < 1:
        raise ConfigError(f"--max-shard-size is {text}; write a number and KB, MB, GB, KiB, MiB or GiB, as in 5GB.")
    return size


def _say(report: Report, what: str) -> None:
    for note in report.notes:
        print(f"note: {note}")
    print(f"{what}: {len(report.tensors)} tensors, equal to the last bit")
    if report.worst_relative_error is None:
        print(f"logits not compared: {report.without_logits}")
    else:
        print(f"logits as transformers computes them, to {report.worst_relative_error:.1e} of the largest")


VERBS: Mapping[str, Verb] = {
    "convert hf-import": Verb("make a checkpoint of a Hugging Face model", hf_import),
    "convert hf-export": Verb("make a Hugging Face model of a checkpoint", hf_export),
    "convert peft-export": Verb("write the adapters (LoRA) of a checkpoint for PEFT", peft_export),
}
