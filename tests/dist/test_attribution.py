"""The first value that is not finite is named: rank, micro-batch, phase, module. Real ranks, real steps.

``tests/bench/nan_hunt.py`` does the same through whole runs, with the samples' names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_slm.model.config import ModelConfig
from megatron_slm.train.attribution import Finding
from megatron_slm.train.config import PrecisionConfig, TrainConfig
from megatron_slm.train.hook import Hook
from tests.faults import STEP, Fault, Plant, parameter
from tests.ranks import run_ranks
from tests.training import Task, build, micro_batches

TASK = Task(
    model=ModelConfig(num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2, seq_length=16),
    precision=PrecisionConfig(),
    train=TrainConfig(micro_batch_size=1, global_batch_size=8),
)
RECOMPUTED = replace(TASK.train, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
LAYER = "decoder.layers."
Change = Callable[[Any, Any], Any]
"""Takes the state and the inputs of a step; returns the handle of a torch hook, or None."""

# Layout, ranks, and pairs of what is planted and what it must be called: phase and tensor.
LAYOUTS: dict[str, tuple[Task, int, list[tuple[Fault, str, str]]]] = {
    "one rank": (
        TASK,
        1,
        [
            (Fault("parameter", LAYER + "2.mlp.linear_fc1"), "parameter", "weight"),
            (Fault("forward", LAYER + "1.mlp.linear_fc2", micro_batch=5), "forward", "output"),
            (Fault("backward", LAYER + "3.mlp.linear_fc1", micro_batch=1), "backward", "gradient of the output"),
            (
                Fault("optimizer state", LAYER + "3.mlp.linear_fc1", tensor="exp_avg"),
                "optimizer state",
                "exp_avg of the weight",
            ),
            (
                Fault("optimizer state", LAYER + "0.mlp.linear_fc2", tensor="exp_avg_sq"),
                "optimizer state",
                "exp_avg_sq of the weight",
            ),
        ],
    ),
    "two replicas": (
        TASK,
        2,
        [
            (Fault("parameter", LAYER + "1.input_layernorm", rank=1), "parameter", "weight"),
            (Fault("input", "loss_mask", rank=1, micro_batch=1), "input", "loss_mask"),
            (Fault("reduction", LAYER + "0.mlp.linear_fc2", rank=1), "reduction", "gradient of the weight"),
        ],
    ),
    "overlapped, distributed optimizer": (
        TASK.on(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
        2,
        [
            (Fault("forward", LAYER + "2.self_attention", rank=1, micro_batch=2), "forward", "output"),
            (
                Fault("backward", LAYER + "1.mlp.linear_fc1", rank=1, micro_batch=3),
                "backward",
                "gradient of the output",
            ),
        ],
    ),
    "tensor and sequence parallel": (
        replace(
            TASK.on(tensor_model_parallel_size=2, sequence_parallel=True),
            train=replace(TASK.train, recompute_granularity="selective"),
        ),
        2,
        [
            (Fault("forward", LAYER + "2.self_attention.core_attention", rank=1, micro_batch=3), "forward", "output"),
            (
                Fault("backward", LAYER + "1.pre_mlp_layernorm", rank=1, micro_batch=0),
                "backward",
                "gradient of the output",
            ),
        ],
    ),
    "context parallel": (
        TASK.on(context_parallel_size=2),
        2,
        [
            (Fault("forward", LAYER + "1.mlp.linear_fc2", rank=1, micro_batch=5), "forward", "output"),
            (
                Fault("backward", LAYER + "2.mlp.linear_fc1", rank=1, micro_batch=3),
                "backward",
                "gradient of the output",
            ),
        ],
    ),
    "experts": (
        replace(
            TASK.on(expert_model_parallel_size=2),
            model=replace(TASK.model, num_moe_experts=4, moe_ffn_hidden_size=16),
        ),
        2,
        [
            (Fault("parameter", LAYER + "1.mlp.router"), "parameter", "weight"),
            (Fault("parameter", LAYER + "2.mlp.experts.local_experts.3.linear_fc2", rank=1), "parameter", "weight"),
            (
                Fault("optimizer state", LAYER + "3.mlp.experts.local_experts.2.linear_fc1", rank=1, tensor="exp_avg"),
                "optimizer state",
                "exp_avg of the weight",
            ),
        ],
    ),
    "recomputed layers": (
        replace(TASK, train=RECOMPUTED),
        1,
        [(Fault("backward", LAYER + "1.mlp.linear_fc1", micro_batch=4), "backward", "gradient of the output")],
    ),
    "pipeline": (
        TASK.on(pipeline_model_parallel_size=2),
        2,
        [(Fault("backward", LAYER + "3.mlp.linear_fc2", rank=1, micro_batch=2), "backward", "gradient of the output")],
    ),
    "interleaved pipeline, recomputed layers": (
        replace(TASK.on(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2), train=RECOMPUTED),
        2,
        [
            (Fault("forward", LAYER + "2.pre_mlp_layernorm", rank=0, micro_batch=2), "forward", "output"),
            (Fault("forward", LAYER + "3.mlp", rank=1, micro_batch=6), "forward", "output"),
        ],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_origin_is_named(layout: str) -> None:
    task, ranks, cases = LAYOUTS[layout]
    every_rank = run_ranks(findings, ranks, task, [fault for fault, _, _ in cases])
    assert all(found == every_rank[0] for found in every_rank), "every rank is told the same"
    for (fault, phase, tensor), found in zip(cases, every_rank[0], strict=True):
        named = (found.phase, found.module, found.tensor, found.rank, found.micro_batch)
        assert named == (phase, fault.module, tensor, fault.rank, fault.micro_batch)
        assert found.reproduced and found.others == () and found.nonfinite == 1
        if fault.micro_batch is not None:
            assert found.samples == (f"micro-batch {fault.micro_batch} of {found.coordinates.split(', ')[-1]}",)
        assert fault.module in found.sentence(STEP)


def test_a_fault_that_does_not_come_back_is_called_transient() -> None:
    """What it has left points at the module whose gradient was spoilt first, in the order of execution."""
    task = TASK.on(pipeline_model_parallel_size=2)
    fault = Fault("backward", LAYER + "1.self_attention.linear_proj", micro_batch=4, once=True)
    ((found,), _) = run_ranks(findings, 2, task, [fault])
    assert not found.reproduced and "transient" in found.sentence(STEP)
    assert (found.rank, found.module, found.tensor) == (0, fault.module, "gradient of the weight")


def test_replicas_with_faults_of_their_own_are_both_reported() -> None:
    ((found,), _) = run_ranks(prepared, 2, TASK, [exploding_activations])
    assert (found.rank, found.micro_batch, found.module) == (1, 0, LAYER + "3.mlp.linear_fc1")
    (other,) = found.others
    assert "rank 0 (tp 0, pp 0, dp 0), independently, the output of decoder.layers.0.mlp.linear_fc1" in other
    assert "(forward of micro-batch 1)" in other


def test_what_is_no_planted_value() -> None:
    """A batch without loss tokens; gradients that only their norm makes infinite; a module with torch's own hook."""
    ((empty, enormous, hooked),) = run_ranks(
        prepared, 1, TASK, [nothing_to_learn, enormous_gradients, bad_backward_hook]
    )
    assert (empty.phase, empty.module) == ("input", "loss_mask")
    assert empty.sentence(STEP) == "No token of the batch counts in the loss: every loss mask is 0."
    assert (enormous.phase, enormous.module) == ("gradient norm", LAYER + "1.mlp.linear_fc1.weight")
    assert "more than fp32 holds" in enormous.sentence(STEP)
    assert (hooked.module, hooked.tensor) == (LAYER + "2.mlp.linear_fc2", "gradient of the input")


def findings(task: Task, faults: list[Fault]) -> list[Finding]:
    """What this rank is told of each fault, one after the other, from the same weights."""
    trained = Trained(task)
    return [trained.attributed(Plant(fault, trained.groups)) for fault in faults]


def prepared(task: Task, changes: list[Change]) -> list[Finding]:
    """What this rank is told of a step whose model or inputs were changed, for one change after the other."""
    trained = Trained(task)
    return [trained.attributed(Prepared(change)) for change in changes]


class Trained:
    """A state and its plan, trained as the loop trains."""

    def __init__(self, task: Task) -> None:
        from megatron_slm.stages import pretrain
        from megatron_slm.train.optimizer_state import initialise_state
        from megatron_slm.train.random_state import RandomState
        from megatron_slm.train.step import StepPlan, TrainState

        self.task = task
        self.groups, chunks, optimizer = build(task)
        initialise_state(optimizer)
        random = RandomState(task.train.seed, dp_rank=self.groups.dp_cp.rank(), pp_rank=self.groups.pp.rank())
        self.state = TrainState(chunks, optimizer, random, Position(0))  # type: ignore[arg-type]
        self.plan = StepPlan(
            pretrain.loss, lambda step: 1e-3, 1e-3, task.model.seq_length, self.groups, torch.device("cpu")
        )

    def attributed(self, plant: Any) -> Finding:
        """Train from step 0 to the rejected one; the state is as before afterwards."""
        from megatron_slm.train.attribution import attribute
        from megatron_slm.train.guard import Guard
        from megatron_slm.train.step import StepInput, train_step

        state, start = self.state, [tensor.clone() for tensor in self.tensors()]
        state.step, guard = 0, Guard(self.task.train)
        plant.before_run(state)
        for step in range(1, STEP + 1):
            inputs = StepInput(micro_batches(self.task, step, self.groups), Position(step))  # type: ignore[arg-type]
            outcome = train_step(state, self.plan, lambda inputs=inputs: inputs, guard, [plant])
            assert outcome.verdict.applies == (step < STEP), f"step {step}: {outcome.verdict}"
        before, random = [tensor.clone() for tensor in self.tensors()], state.random.capture()
        replica = self.groups.dp.rank()
        found = attribute(
            state,
            self.plan,
            outcome.inputs,
            outcome.random,
            samples_of=lambda number: [f"micro-batch {number} of dp {replica}"],
        )
        plant.after_run(state, 0)
        assert all(
            torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(before, self.tensors(), strict=True)
        )
        assert random["torch"].equal(state.random.capture()["torch"]), "random states are left as they were"
        parameters = [param for chunk in state.chunks for param in chunk.parameters()]
        assert not any(param.main_grad.any() for param in parameters), "gradients are left cleared"
        with torch.no_grad():
            for tensor, value in zip(self.tensors(), start, strict=True):
                tensor.copy_(value)
        return found

    def tensors(self) -> list[torch.Tensor]:
        """Weights and optimizer states."""
        from megatron_slm.train.optimizer_state import inner_optimizers

        weights = [param.data for chunk in self.state.chunks for param in chunk.parameters()]
        states = [inner.optimizer.state for inner in inner_optimizers(self.state.optimizer)]
        return weights + [value for state in states for values in state.values() for value in values.values()]


class Position:
    """As much of a cursor as a step reads."""

    rolling_digest, skipped_samples = "", 0

    def __init__(self, step: int) -> None:
        self.consumed_samples = step


class Prepared(Hook):
    """Changes model or inputs in the step that is to be rejected, until the end."""

    def __init__(self, change: Change) -> None:
        self.change, self.handle = change, None

    def before_forward(self, state: Any, inputs: Any) -> None:
        if state.step + 1 == STEP:
            self.handle = self.change(state, inputs)

    def after_run(self, state: Any, code: int) -> None:
        if self.handle is not None:
            self.handle.remove()


def exploding_activations(state: Any, inputs: Any) -> Any:
    """The first replica overflows in its second micro-batch, the second one in its first, in a later layer."""
    first, calls = torch.distributed.get_rank() == 0, []

    def explode(module: Any, args: Any, output: Any) -> None:
        calls.append(1)
        if len(calls) % len(inputs.micro_batches) == (2 if first else 1):
            output[0].data.mul_(1e30).mul_(1e30)

    layer = state.chunks[0].module.decoder.layers[0 if first else 3]
    return layer.mlp.linear_fc1.register_forward_hook(explode)


def nothing_to_learn(state: Any, inputs: Any) -> None:
    for batch in inputs.micro_batches:
        batch["loss_mask"].zero_()


def enormous_gradients(state: Any, inputs: Any) -> Any:
    weight = parameter(state, LAYER + "1.mlp.linear_fc1.weight")
    return weight.register_hook(lambda gradient: torch.full_like(gradient, 1e22))


def bad_backward_hook(state: Any, inputs: Any) -> Any:
    def spoil_input(module: Any, made: Any, received: Any) -> Any:
        return (made[0] * float("inf"), *made[1:])

    return state.chunks[0].module.decoder.layers[2].mlp.linear_fc2.register_full_backward_hook(spoil_input)
