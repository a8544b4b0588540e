"""The models of a run on one rank: the trained one with gradients and optimizer, and frozen ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_slm.config.run_config import RunConfig
from megatron_slm.model.core_config import transformer_config
from megatron_slm.model.ending import Ending, Scalar
from megatron_slm.model.gpt import build_chunks
from megatron_slm.parallel.gradients import wrap
from megatron_slm.parallel.specs import choose_spec
from megatron_slm.run_stage import ending_of
from megatron_slm.train.optimizer import build_optimizer
from megatron_slm.train.optimizer_state import initialise_state
from megatron_slm.train.random_state import RandomState


class BuiltModel(NamedTuple):
    """A rank's wrapped chunks, their optimizer and random streams, and why the layers are what they are."""

    chunks: list[nn.Module]
    optimizer: MegatronOptimizer
    random: RandomState
    reason: str


class Layers(NamedTuple):
    """Core's configuration, the layers' spec, the final norm's class, and why they are what they are."""

    core: TransformerConfig
    spec: ModuleSpec
    norm: Any
    reason: str


def build_model(
    config: RunConfig, groups: Any, device: torch.device, vocab_size: int, ending: Ending | Scalar | None = None
) -> BuiltModel:
    """What a configuration alone decides of a rank's state, without any data.

    Args:
        ending: of the model; the stage's by default.
    """
    core = transformer_config(config.model, config.parallel, config.precision, config.train, device=device.type)
    spec, norm, reason = choose_spec(device.type, config.model, packed_documents=packs_documents(config))
    layers = Layers(core, spec, norm, reason)
    return assemble_model(config, groups, device, vocab_size, layers=layers, ending=ending)


def assemble_model(
    config: RunConfig,
    groups: Any,
    device: torch.device,
    vocab_size: int,
    *,
    layers: Layers,
    ending: Ending | Scalar | None = None,
) -> BuiltModel:
    """The same of layers that are chosen already."""
    core = layers.core
    random = RandomState(config.train.seed, dp_rank=groups.dp_cp.rank(), pp_rank=groups.pp.rank())
    chunks = build_chunks(
        config.model,
        core,
        groups,
        vocab_size=vocab_size,
        seed=config.train.seed,
        spec=(layers.spec, layers.norm),
        device=device,
        ending=ending or ending_of(config, vocab_size),
        lora=config.lora,
    )
    half = config.precision.bf16
    chunks = wrap(
        chunks,
        core,
        config.parallel,
        groups,
        reduce_in_fp32=half and config.precision.accumulate_allreduce_grads_in_fp32,
    )
    optimizer = build_optimizer(
        chunks,
        config.optimizer,
        config.precision,
        groups,
        distributed=config.parallel.use_distributed_optimizer,
        width_multiplier=config.model.width_multiplier,
    )
    initialise_state(optimizer)
    return BuiltModel(chunks, optimizer, random, layers.reason)


def build_frozen(
    config: RunConfig, groups: Any, device: torch.device, vocab_size: int, ending: Ending | Scalar
) -> list[nn.Module]:
    """Bare chunks of the configuration's model, laid out as the trained one, that have no gradients."""
    core = transformer_config(config.model, config.parallel, config.precision, config.train, device=device.type)
    spec, norm, _ = choose_spec(device.type, config.model, packed_documents=packs_documents(config))
    chunks = build_chunks(
        config.model,
        core,
        groups,
        vocab_size=vocab_size,
        seed=config.train.seed,
        spec=(spec, norm),
        device=device,
        ending=ending,
        lora=config.lora,
    )
    return [chunk.eval().requires_grad_(requires_grad=False) for chunk in chunks]


def packs_documents(config: RunConfig) -> bool:
    """Whether tokens attend to their own document only: examples always do."""
    return config.data.reset_attention_mask or config.stage != "pretrain"
