"""The first value that is not finite is named: rank, micro-batch, module, samples. One plant a case, real ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_slm.model.config import ModelConfig
from megatron_slm.train.config import PrecisionConfig, TrainConfig
from tests.faults import STEP, Fault, Plant
from tests.ranks import run_ranks
from tests.training import Task, build, micro_batches

TASK = Task(
    model=ModelConfig(num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2, seq_length=16),
    precision=PrecisionConfig(),
    train=TrainConfig(micro_batch_size=1, global_batch_size=8),
)


def investigate(task: Task, fault: Fault) -> Any:
    """What this rank is told of the fault."""
    from megatron_slm.stages import pretrain
    from megatron_slm.train.attribution import attribute
    from megatron_slm.train.guard import Guard
    from megatron_slm.train.optimizer_state import initialise_state
    from megatron_slm.train.random_state import RandomState
    from megatron_slm.train.step import StepInput, StepPlan, TrainState, train_step

    groups, chunks, optimizer = build(task)
    initialise_state(optimizer)
    random = RandomState(task.train.seed, dp_rank=groups.dp.rank(), pp_rank=groups.pp.rank())
    state = TrainState(chunks, optimizer, random, Position(0))  # type: ignore[arg-type]
    plan = StepPlan(pretrain.loss, lambda step: 1e-3, 1e-3, task.model.seq_length, groups, torch.device("cpu"))
    plant, guard = Plant(fault, groups), Guard(task.train)
    plant.before_run(state)
    for step in range(1, STEP + 1):
        inputs = StepInput(micro_batches(task, step, groups), Position(step))  # type: ignore[arg-type]
        outcome = train_step(state, plan, lambda inputs=inputs: inputs, guard, [plant])
        assert outcome.verdict.applies == (step < STEP), f"step {step}: {outcome.verdict}"
    before = [param.detach().clone() for chunk in chunks for param in chunk.parameters()]
    finding = attribute(
        state,
        plan,
        outcome.inputs,
        outcome.random,
        samples_of=lambda number: [f"micro-batch {number} of dp {groups.dp.rank()}"],
    )
    after = [param for chunk in chunks for param in chunk.parameters()]
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(before, after, strict=True))
    assert not any(param.main_grad.any() for param in after), "gradients are left cleared"
    return finding


class Position:
    """As much of a cursor as a step reads."""

    rolling_digest, skipped_samples = "", 0

    def __init__(self, step: int) -> None:
        self.consumed_samples = step


CASES = {
    "a weight": (TASK, 1, Fault("parameter", "decoder.layers.2.mlp.linear_fc1")),
    "a norm, one dp rank": (TASK, 2, Fault("parameter", "decoder.layers.1.input_layernorm", rank=1)),
    "an activation": (TASK, 1, Fault("forward", "decoder.layers.1.mlp.linear_fc2", micro_batch=5)),
    "attention of one tp rank": (
        TASK.on(tensor_model_parallel_size=2),
        2,
        Fault("forward", "decoder.layers.2.self_attention.core_attention", rank=1, micro_batch=3),
    ),
    "a gradient, pipeline": (
        TASK.on(pipeline_model_parallel_size=2),
        2,
        Fault("backward", "decoder.layers.1.self_attention.linear_proj", rank=0, micro_batch=6),
    ),
    "interleaved chunks": (
        TASK.on(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        2,
        Fault("forward", "decoder.layers.2.pre_mlp_layernorm", rank=0, micro_batch=2),
    ),
    "first moment": (TASK, 1, Fault("optimizer state", "decoder.layers.3.mlp.linear_fc1", tensor="exp_avg")),
    "reduction": (TASK, 2, Fault("reduction", "decoder.layers.0.mlp.linear_fc2", rank=1)),
    "data": (TASK, 2, Fault("input", "loss_mask", rank=1, micro_batch=1)),
    "transient": (TASK, 1, Fault("forward", "decoder.layers.1.mlp", micro_batch=1, once=True)),
}
