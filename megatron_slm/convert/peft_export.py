"""The adapters of a checkpoint as PEFT's files: ``adapter_config.json`` and ``adapter_model.safetensors``.

Hugging Face's models have queries, keys and values, gate and up, each in a linear layer of its own. Their adapters
share the A of our one layer, and its B is divided by rows as the weight is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from megatron_slm.config.load import load
from megatron_slm.convert.adapters import WEIGHT, StoredAdapters
from megatron_slm.convert.output import refuse_existing, whole_or_nothing
from megatron_slm.errors import CheckpointError
from megatron_slm.model.config import LoraConfig
from megatron_slm.model.hf import Block, blocks
from megatron_slm.model.hf_config_out import choose_model_type
from megatron_slm.train import recovery
from megatron_slm.train.checkpoint import HEAD
from megatron_slm.train.payload_index import is_weight

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""PEFT's model holds a tuner, and that the model of transformers."""


@dataclass(frozen=True)
class Exported:
    """What was written: the checkpoint it is of, the model's type, and the number of adapters in PEFT's count."""

    checkpoint: Path
    model_type: str
    adapters: int


def export_adapters(checkpoint: Path, output: Path, *, base: str | None = None) -> Exported:
    """Write the directory ``output``, whole or not at all; ``peft.PeftModel.from_pretrained`` reads it.

    Args:
        checkpoint: a run's directory, whose newest whole checkpoint is used, or one of its checkpoints.
        base: name or directory of the model that the adapters belong to, for PEFT to find.

    Raises:
        CheckpointError: there are no adapters, transformers has no such model or PEFT no such names for it, the
            checkpoint is damaged, or ``output`` exists or cannot be written.
    """
    refuse_existing(output)
    found = recovery.find(checkpoint)
    config = load(found.path / "config.yaml").config
    adapters = StoredAdapters(found.path)
    if any(is_weight(name) and name.endswith(HEAD) for name in adapters.index.tensors):
        raise CheckpointError(
            f"{found.path} ends with a number and not with words; PEFT's files would lose its head. Keep the "
            "checkpoint as it is, or put the adapters into its weights with mslm checkpoint merge-lora"
        )
    model_type = choose_model_type(config.model, None)
    if model_type == "gpt2":
        raise CheckpointError(
            f"{found.path} is a {model_type}, of which transformers stores matrices transposed; put the adapters into "
            "the weights with mslm checkpoint merge-lora, and export those with mslm convert hf-export"
        )
    tensors: dict[str, Tensor] = {}
    for block in blocks(config.model, model_type, config.model.vocab_size or 1):
        if block.name in adapters.weights:
            tensors |= _named(block, *adapters.factors(block.name, block.index))
    with whole_or_nothing(output) as temporary:
        save_file(tensors, temporary / TENSORS_FILE, metadata={"format": "pt"})
        described = peft_config(config.lora, sorted({name.split(".")[-3] for name in tensors}), base)
        (temporary / CONFIG_FILE).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Exported(found.path, model_type, len(tensors) // 2)


def _named(block: Block, first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """PEFT's tensors of one layer: A [R, I] for each part of the weight, and the part's rows of B [O, R]."""
    named: dict[str, Tensor] = {}
    for part, rows in zip(block.parts, replace(block, shape=tuple(second.shape)).split(second), strict=True):
        place = PREFIX + part.name.removesuffix(WEIGHT)
        # Each has a storage of its own: safetensors refuses tensors that share one.
        named |= {f"{place}.lora_A.weight": first.clone(), f"{place}.lora_B.weight": rows}
    return named


def peft_config(lora: LoraConfig, modules: list[str], base: str | None) -> dict[str, Any]:
    """``adapter_config.json``; what is not in it PEFT takes as its defaults, which leave everything else off."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.lora_rank,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "use_rslora": lora.lora_rslora,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
