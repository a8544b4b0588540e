"""The logits of a checkpoint against those that transformers computes from the Hugging Face files, in fp32."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from megatron_slm.config.run_config import RunConfig
from megatron_slm.convert.report import NEAR_TIE, PromptRow
from megatron_slm.errors import ConfigError, ConversionError
from megatron_slm.model.config import ModelConfig
from megatron_slm.model.counts import parameters
from megatron_slm.run_generate import model_on_one_rank
from megatron_slm.train.config import PrecisionConfig

PROMPT_LENGTHS = (1, 7, 32, 96)
PROMPT_SEED = 20_000
WITHOUT = "--no-logits converts without the comparison"


def require_comparable(model: ModelConfig, vocab_size: int) -> None:
    """Refuse before anything is written what could not be compared afterwards.

    Raises:
        ConfigError: transformers is not installed, or the model in fp32 does not fit into this machine's memory.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "The logits are compared with those of transformers, which is not installed: pip install "
            f"'megatron-slm[hf]', or {WITHOUT}."
        )
    needed, there = 4 * parameters(model, model.padded_vocab_size(vocab_size)), psutil.virtual_memory().available
    if needed > there:
        raise ConfigError(
            f"The logits are compared in fp32, for which the model takes {needed / 1e9:.1f} GB of the "
            f"{there / 1e9:.1f} GB that this machine has free; convert on a larger one, or {WITHOUT}."
        )


def compare(
    checkpoint: Path,
    directory: Path,
    config: RunConfig,
    *,
    vocab_size: int,
    ema: bool = False,
    rounded: torch.dtype | None = None,
) -> list[PromptRow]:
    """One row for each prompt. The two models are in memory one after the other.

    Args:
        checkpoint: of ours.
        directory: of the Hugging Face model.
        vocab_size: real columns of the logits.
        ema: the checkpoint's averages of the weights.
        rounded: the format that the checkpoint's weights were rounded to in ``directory``; None where they were not.

    Raises:
        ConversionError: transformers cannot load the directory, or finds tensors missing in it.
    """
    prompts = fixed_prompts(vocab_size, config.model.position_limit)
    theirs = _of_transformers(directory, prompts)
    exact = replace(config, precision=PrecisionConfig())
    with model_on_one_rank(checkpoint, exact, vocab_size=vocab_size, device="cpu", ema=ema) as model, torch.no_grad():
        for parameter in model.parameters() if rounded is not None else ():
            parameter.copy_(parameter.to(rounded))
        ours = [_forward(model, prompt)[:, :vocab_size] for prompt in prompts]
    return [_row(a, b) for a, b in zip(ours, theirs, strict=True)]


def fixed_prompts(vocab_size: int, position_limit: int) -> list[Tensor]:
    """Token ids int64 [1, S] of several lengths: the same for every model with this vocabulary and these positions."""
    generator = torch.Generator().manual_seed(PROMPT_SEED)
    lengths = sorted({min(length, position_limit) for length in PROMPT_LENGTHS})
    return [torch.randint(0, vocab_size, (1, length), generator=generator) for length in lengths]


def _row(ours: Tensor, theirs: Tensor) -> PromptRow:
    """ours, theirs: logits [S, V]."""
    largest = float(theirs.abs().max())
    likeliest = theirs.argmax(dim=-1, keepdim=True)
    picked = ours.argmax(dim=-1, keepdim=True)
    apart = theirs.gather(-1, likeliest) - theirs.gather(-1, picked)
    return PromptRow(
        tokens=len(ours),
        max_abs_error=float((ours - theirs).abs().max()),
        max_abs_logit=largest,
        agreeing=int((picked == likeliest).sum()),
        near_ties=int(((picked != likeliest) & (apart <= NEAR_TIE * largest)).sum()),
    )


def _of_transformers(directory: Path, prompts: list[Tensor]) -> list[Tensor]:
    # As a value of no type: its own say that from_pretrained returns a model alone.
    transformers: Any = importlib.import_module("transformers")
    with _quiet(transformers):
        try:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            said = (str(error).splitlines() or [repr(error)])[0]
            raise ConversionError(f"transformers {transformers.__version__} cannot load {directory}: {said}") from error
    if missing := sorted(info["missing_keys"]):
        raise ConversionError(f"transformers {transformers.__version__} misses {missing[0]} in {directory}")
    model.eval()
    with torch.no_grad():
        return [model(prompt, use_cache=False).logits[0].float() for prompt in prompts]


def _forward(model: Any, prompt: Tensor) -> Tensor:
    positions = torch.arange(prompt.shape[1])[None]
    logits: Tensor = model(input_ids=prompt, position_ids=positions, attention_mask=None)
    return logits[0].float()


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars and warnings of the library, whose result is compared anyway."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
