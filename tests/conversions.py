"""Tiny random models of every family, and ``mslm`` in a process of its own, for the tests of conversions."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from tests.ranks import run_ranks

VOCAB = 100  # 28 rows below the embedding's 128: padding must appear and vanish again

DECODER = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", DECODER),
    "llama-tied-bfloat16": ("Llama", {**DECODER, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-biases-wide-heads": ("Llama", {**DECODER, "attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama-3.1": ("Llama", {**DECODER, "rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("Qwen2", DECODER),
    "qwen3": ("Qwen3", {**DECODER, "head_dim": 16}),
    "mistral-window": ("Mistral", {**DECODER, "sliding_window": 64}),
    "mixtral": ("Mixtral", {**DECODER, "num_local_experts": 4}),
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied-gelu": ("GPT2", {**GPT2, "tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 80}),
}


def make(directory: Path, name: str, config: dict[str, Any], dtype: torch.dtype = torch.float32, **saved: Any) -> Path:
    """A random model, saved by transformers; weights large enough for logits of order 1."""
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(7)
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{name}{head}")(getattr(transformers, f"{name}Config")(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=1.0 if parameter.dim() == 1 else 0.0, std=0.1)
    model.to(dtype).save_pretrained(directory, **saved)
    return directory


def mslm(commands: list[list[str]], plants: dict[int, str] | None = None) -> list[tuple[int, str]]:
    """``mslm ...`` of each, one after the other in one process; the exit codes and what was said.

    Args:
        plants: number of a command -> the name in ``PLANTS`` of what is wrong while it runs.
    """
    result: list[tuple[int, str]] = run_ranks(_run, 1, commands, plants or {}, timeout_s=300.0)[0]
    for _, said in result:
        assert "Traceback" not in said, said
    return result


def converted(*commands: list[Any]) -> None:
    """Conversions that must succeed."""
    for code, said in mslm([["convert", *map(str, command)] for command in commands]):
        assert code == 0, said


def _run(commands: list[list[str]], plants: dict[int, str]) -> list[tuple[int, str]]:
    import torch.distributed as dist

    from megatron_slm import cli

    dist.destroy_process_group()  # a verb makes its own
    ended = []
    for number, tokens in enumerate(commands):
        planted = PLANTS[plants[number]]() if number in plants else contextlib.nullcontext()
        said, out = io.StringIO(), io.StringIO()
        with planted, contextlib.redirect_stderr(said), contextlib.redirect_stdout(out):
            code = cli.main(tokens)
        ended.append((code, said.getvalue() + out.getvalue()))
    return ended


def _heads_out_of_order() -> Any:
    """Reading and writing agree with each other, and are both wrong."""

    def in_order(heads: int, groups: int, head_dim: int) -> torch.Tensor:
        return torch.arange((heads + 2 * groups) * head_dim)

    return mock.patch("megatron_slm.model.hf.by_group", in_order)


def _one_bit_too_many() -> Any:
    """The disk gives back another number than was written."""
    from megatron_slm.train.payload_stream import BlockReader

    right = BlockReader.block

    def wrong(self: Any, name: str, offsets: Any, sizes: Any) -> torch.Tensor:
        found = right(self, name, offsets, sizes)
        if name == "decoder.layers.mlp.linear_fc2.weight":
            found.view(torch.int32)[0, 0, 0] ^= 1
        return found

    return mock.patch.object(BlockReader, "block", wrong)


def _no_transformers() -> Any:
    return mock.patch.dict(sys.modules, {"transformers": None})  # what Python calls a module that is not to be imported


@contextlib.contextmanager
def _full_disk() -> Iterator[None]:
    """No file may grow beyond 20 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


PLANTS: dict[str, Callable[[], Any]] = {
    "full disk": _full_disk,
    "heads out of order": _heads_out_of_order,
    "one bit too many": _one_bit_too_many,
    "no transformers": _no_transformers,
}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face directory."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def report(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "conversion.json").read_text())
    return found
