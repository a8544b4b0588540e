"""One rank's whole work: build the model as ``run.py`` does, take the loop's steps on made-up data, keep what came out.

It never looks at another layout: a job of n ranks and the job of one rank run this same code, and ``compare.py`` reads
what both have left.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm import run, run_model
from megatron_slm.config.run_config import RunConfig
from megatron_slm.model.ending import TokenDivergence
from megatron_slm.parallel.gradients import gathered_parameters, unwrap
from megatron_slm.parallel.layout import Layout
from megatron_slm.parallel.pipeline import Batch
from megatron_slm.replay.shards import Shard, gradient_shards, local_shards, master_shards
from megatron_slm.replay.watch import Place, Watch, Watched
from megatron_slm.stages import made_up, pretrain
from megatron_slm.train import checkpoint
from megatron_slm.train.guard import Guard
from megatron_slm.train.hook import Hook, StepResult
from megatron_slm.train.saved_state import SavedState, layout_record
from megatron_slm.train.step import StepInput, StepPlan, TrainState, train_step
from megatron_slm.verify import setting
from megatron_slm.verify.batches import micro_batches, start_cursor

STEPS = 2
FALLBACK_RATE = 1e-3
"""Learning rate of the comparison where the configured peak is 0: an update that changes nothing proves nothing."""
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepNumbers:
    """What the loop would log of one step; equal on every rank."""

    means: dict[str, float]
    """The loss by its name, and what else the stage logs."""
    tokens: int
    grad_norm: float


@dataclass
class Tensors:
    """This rank's part of everything that training changes, by global name."""

    weights: list[Shard]
    masters: list[Shard]
    moments: dict[str, list[Shard]]


@dataclass
class Outcome:
    """What one rank of one job has come to."""

    place: Place
    start: Tensors
    gradients: list[Shard] = field(default_factory=list)
    """Of the first step, reduced, not clipped."""
    after: Tensors | None = None
    """After the first step."""
    steps: list[StepNumbers] = field(default_factory=list)
    sums: list[dict[str, float]] = field(default_factory=list)
    """What the loss of each micro-batch of each step has logged, where it is known."""
    not_resumed: list[str] | None = None
    """What the second step, taken again from the checkpoint, did otherwise; None where nothing was saved."""
    watched: list[Watched] = field(default_factory=list)


class KeepGradients(Hook):
    """Keeps the reduced gradients of a step before they are clipped and used."""

    def __init__(self) -> None:
        self.shards: list[Shard] = []

    def before_update(self, state: TrainState, inputs: StepInput) -> None:
        if not self.shards:
            self.shards = gradient_shards(state.chunks, state.optimizer)


@dataclass
class Bench:
    """A built rank, ready to step."""

    config: RunConfig
    groups: Any
    state: TrainState
    plan: StepPlan
    sums: list[dict[str, float]] = field(default_factory=list)

    @staticmethod
    def build(config: RunConfig, groups: Any) -> Bench:
        """Model and optimizer as a run of ``config`` builds them, with a fixed learning rate."""
        device = torch.device("cpu")
        model = run_model.build_model(config, groups, device, config.model.vocab_size or setting.VOCAB_SIZE)
        give_teacher(model.chunks, groups)
        state = TrainState(model.chunks, model.optimizer, model.random, start_cursor(config))
        rate = config.optimizer.lr or FALLBACK_RATE
        plan = run.step_plan(config, groups, device)
        plan = replace(plan, learning_rate=lambda step: rate, peak_learning_rate=rate)
        bench = Bench(config, groups, state, plan)
        bench.plan = replace(plan, loss=bench.noting(plan.loss))
        return bench

    def noting(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        """The stage's loss, which also notes what it logs of each micro-batch."""

        def noted(output: Tensor, batch: Batch) -> Any:
            total, tokens, logged = loss(output, batch)
            self.sums.append({name: float(pair[0]) for name, pair in logged.items()})
            return total, tokens, logged

        return noted

    def step(self, *hooks: Hook, reverse: bool = False) -> StepNumbers:
        """Take the next step of the loop; its numbers."""
        dp = self.groups.dp
        batches = micro_batches(self.config, self.state.step, dp_rank=dp.rank(), dp_size=dp.size())
        local = [pretrain.local_batch(batch, self.plan) for batch in (batches[::-1] if reverse else batches)]
        inputs = StepInput(local, self.state.cursor.advance(self.config.train.global_batch_size))
        result: StepResult = train_step(self.state, self.plan, lambda: inputs, Guard(self.config.train), hooks).result
        return StepNumbers({self.plan.logged[0]: result.loss, **result.extra}, result.num_tokens, result.grad_norm)

    def tensors(self) -> Tensors:
        """Weights and optimizer as they stand."""
        chunks, optimizer = self.state.chunks, self.state.optimizer
        with gathered_parameters(chunks):
            return Tensors(
                local_shards(chunks),
                master_shards(chunks, optimizer, lambda master, state: master.tensor),
                {name: master_shards(chunks, optimizer, lambda _, state: state.get(name)) for name in MOMENTS},  # noqa: B023
            )


def give_teacher(chunks: list[Any], groups: Any) -> None:
    """Put a made-up output matrix where a distillation's ending expects that of a running teacher."""
    model = unwrap(chunks[-1])
    if isinstance(ending := getattr(model, "ending", None), TokenDivergence):
        weight = model.output_layer.weight if hasattr(model, "output_layer") else None
        if weight is None or not weight.numel():  # tied to the embedding
            weight = model.shared_embedding_or_output_weight()
        rows = made_up.teacher_rows(groups.tp.rank() * len(weight), len(weight)).to(weight.dtype)
        model.ending = replace(ending, teacher_weight=lambda: rows)


def outcome(
    config: RunConfig, groups: Any, *, save_to: Path | None = None, perturbation: int = 0, watch: bool = False
) -> Outcome:
    """Build the job on this rank and take its steps. Collective.

    Args:
        save_to: directory for a checkpoint after the first step, from which the second is then taken again.
        perturbation: above 0, disturb the job by rounding errors: weights by one unit in the last place, micro-batches
            in reverse. Different numbers draw different errors.
        watch: keep what every named module of the model puts out, and the gradient of it, in the first step alone.
    """
    bench = Bench.build(config, groups)
    if perturbation:
        perturb(bench.state, perturbation)
    found = Outcome(Place.of(groups), bench.tensors())
    keep = KeepGradients()
    watcher = Watch(bench.state.chunks) if watch else None
    found.steps.append(bench.step(keep, reverse=perturbation > 0))
    found.gradients, found.after = keep.shards, bench.tensors()
    if watcher is not None:
        found.watched = watcher.stop(reverse=perturbation > 0)
    path = save(bench, save_to) if save_to is not None else None
    while len(found.steps) < STEPS:
        found.steps.append(bench.step(reverse=perturbation > 0))
    found.sums = bench.sums
    if path is not None:
        found.not_resumed = resumed_otherwise(bench, path, found.steps[-1])
    return found


def perturb(state: TrainState, number: int) -> None:
    """Move every weight by one unit in the last place of its format, up or down; zeros stay."""
    random = torch.Generator().manual_seed(number)
    for parameter in (parameter for chunk in state.chunks for parameter in chunk.parameters()):
        sign = torch.randint(0, 2, parameter.shape, generator=random).double().mul_(2.0).sub_(1.0)
        moved = parameter.data.double() * (1.0 + sign * torch.finfo(parameter.dtype).eps)
        parameter.data.copy_(moved)
    state.optimizer.reload_model_params()


def save(bench: Bench, directory: Path) -> Path:
    """Publish a checkpoint as a run does. Collective."""
    state, config = bench.state, bench.config
    saved = SavedState(
        step=state.step,
        consumed_samples=state.cursor.consumed_samples,
        cursor=state.cursor.to_dict(),
        layout=_layout(config),
        params_dtype=config.precision.params_dtype,
        tokenizer_hash=state.cursor.tokenizer_hash,
        parts=sorted(state.parts),
    )
    to = checkpoint.Destination(directory, identity="verify", add_files=lambda temporary: None)
    with gathered_parameters(state.chunks):
        return checkpoint.write(checkpoint.stage(saved, state, copy=False), to)


def resumed_otherwise(bench: Bench, path: Path, numbers: StepNumbers) -> list[str]:
    """What a job built anew from the checkpoint ends its second step with that ``bench`` has not. Collective."""
    again = Bench.build(bench.config, bench.groups)
    saved, _ = checkpoint.load(path, again.state, layout=_layout(bench.config))
    again.state.step = saved.step
    again.state.cursor = again.state.cursor.advance(saved.consumed_samples)
    repeated = again.step()
    return [
        *(["loss, tokens or gradient norm"] if repeated != numbers else []),
        *unequal(again.tensors(), bench.tensors()),
    ]


def unequal(found: Tensors, expected: Tensors) -> list[str]:
    """Names of this rank's tensors that are not equal to the last bit."""
    pairs = [("weight", found.weights, expected.weights), ("master weight", found.masters, expected.masters)]
    pairs += [(name, found.moments[name], expected.moments[name]) for name in MOMENTS]
    return [
        f"{mine.name} ({kind})"
        for kind, ours, theirs in pairs
        for mine, other in zip(ours, theirs, strict=True)
        if not torch.equal(mine.values.nan_to_num(), other.values.nan_to_num())
    ]


def loaded(config: RunConfig, groups: Any, path: Path) -> Tensors:
    """Weights and optimizer of a checkpoint of any layout, as this job reads them. Collective."""
    bench = Bench.build(config, groups)
    checkpoint.load(path, bench.state, layout=_layout(config))
    return bench.tensors()


def _layout(config: RunConfig) -> dict[str, int]:
    return layout_record(Layout.from_config(config.parallel, dist.get_world_size()))


def leave(found: Outcome, directory: Path) -> None:
    """Write this rank's outcome for ``read``."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"rank{dist.get_rank()}.pickle").open("wb") as file:
        ArrayPickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(found)


def read(directory: Path) -> list[Outcome]:
    """What all ranks of a job have left, by rank."""
    files = sorted(directory.glob("rank*.pickle"), key=lambda file: int(file.stem.removeprefix("rank")))
    return [pickle.loads(file.read_bytes()) for file in files]


class ArrayPickler(pickle.Pickler):
    """Tensors as arrays: torch's own format takes a millisecond for each of thousands. bf16 becomes fp32 exactly."""

    def reducer_override(self, found: object) -> Any:
        """How one object is written; NotImplemented is pickle's own way."""
        if not isinstance(found, Tensor):
            return NotImplemented
        plain = found.detach().float() if found.dtype == torch.bfloat16 else found.detach()
        return torch.from_numpy, (plain.contiguous().numpy(),)
