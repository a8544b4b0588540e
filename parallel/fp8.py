"""Where FP8 can be computed: the refusals that depend on a machine. No torch."""

from __future__ import annotations

import importlib.util

from megatron_slm.errors import ConfigError
from megatron_slm.train.config import PrecisionConfig

GENERATIONS = ("ampere", "hopper", "blackwell")
FIRST = {"delayed": "hopper", "tensorwise": "hopper", "blockwise": "hopper", "mxfp8": "blackwell"}
"""Recipe -> the first generation of GPUs that has it (Transformer Engine 2.11, ``pytorch/quantization.py``). Ada, which
has the first two as well, is none of ours."""


def require_generation(precision: PrecisionConfig, generation: str, gpu: str) -> None:
    """Refuse a recipe that a GPU does not have.

    Raises:
        ConfigError: it has not.
    """
    if precision.fp8 is None or generation not in GENERATIONS:
        return
    first = FIRST[precision.fp8_recipe]
    if GENERATIONS.index(generation) < GENERATIONS.index(first):
        raise ConfigError(
            f"precision.fp8 = {precision.fp8} with precision.fp8_recipe = {precision.fp8_recipe} on {gpu} "
            f"({generation}): GPUs have that from {first} on. Choose another GPU or recipe, or leave precision.fp8 out."
        )


def require_engine(precision: PrecisionConfig, device: str) -> None:
    """Refuse to run in FP8 where nothing computes in it.

    Raises:
        ConfigError: on CPU ranks, without Transformer Engine, or with parameters in FP8.
    """
    if precision.fp8 is None:
        return
    if device != "cuda":
        raise ConfigError(
            f"precision.fp8 = {precision.fp8} on CPU ranks: Transformer Engine multiplies in FP8 on a GPU alone. Leave "
            "precision.fp8 out; mslm memory and mslm plan answer for a GPU without one."
        )
    if importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(
            f"precision.fp8 = {precision.fp8} needs Transformer Engine, which cannot be imported. Install "
            "transformer-engine, or leave precision.fp8 out."
        )
    if precision.fp8_param_gather:
        raise ConfigError(
            "precision.fp8_param_gather = true is modelled by mslm memory alone: this program's initial values do not "
            "reach such weights' masters yet. Leave it out."
        )
