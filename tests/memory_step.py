"""One real step of a rank inside ``run_ranks`` or a pool, measured twice: by torch's profiler and by our recorder.

Experts get an even share of tokens, as in the dry world: where a router sends its tokens is a value, and decides sizes.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves

from megatron_slm.config.run_config import RunConfig

STEP = "the measured step"
STEPS = 3
"""The least of them counts: a tensor that a thread of gloo is the last to hold is released where the profiler does not
see it, which adds to a step now and then, and never takes away."""
QUEUED = (
    "allreduce", "allgather", "all_gather_single", "all_gather_single_coalesced", "all_to_all_single", "alltoall",
    "broadcast", "reduce", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced",
)  # fmt: skip
"""Collectives of a process group that gloo's threads work on; sends and receives are not among them."""


class Measured(NamedTuple):
    """One rank's step.

    Attributes:
        peak_bytes: the storages that a step finds, and the most beside them, from torch's profiler.
        static: (kind, module) -> bytes between steps, by their storages.
        saved: (chunk, layer) -> bytes that autograd holds of one micro-batch, by its saved-tensor hooks.
        recorded_peak_bytes: of another step, from the recorder of ``mslm train --memory-ledger``.
        recorded: kind -> bytes at that moment.
    """

    peak_bytes: int
    static: dict[tuple[str, str], int]
    saved: dict[tuple[int, str], int]
    recorded_peak_bytes: int
    recorded: dict[str, int]


def measured(config: RunConfig) -> Measured:
    """Build this rank and take steps: one that leaves what later ones find, the others for the two instruments."""
    from megatron_slm import run, run_model
    from megatron_slm.memory.measure import StepRecorder
    from megatron_slm.parallel.groups import build_groups, is_last_pipeline_rank

    route_evenly()
    groups = build_groups(config.parallel)
    before = existing_bytes()  # of the calls that came before this one
    built = run_model.build_model(config, groups, torch.device("cpu"), config.model.vocab_size or 0)
    plan = run.step_plan(config, groups, torch.device("cpu"))
    take_step(config, built, plan)
    existing = existing_bytes() - before
    recorder = StepRecorder(built.chunks, built.optimizer)
    with settled(), profile(profile_memory=True, activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(STEPS):
            with record_function(STEP):
                take_step(config, built, plan)
    peak = existing + profiled_bytes(profiler)
    with recorder:
        take_step(config, built, plan)
    found = recorder.measurement(dist.get_rank(), groups.pp.rank(), ends_model=is_last_pipeline_rank(groups))
    static: dict[tuple[str, str], int] = {}
    for part in recorder.static:
        static[part.kind, part.module] = static.get((part.kind, part.module), 0) + part.size
    kinds: dict[str, int] = {}
    for row in found.rows:
        kinds[row.kind] = kinds.get(row.kind, 0) + row.size
    return Measured(peak, static, found.saved, found.peak_bytes, kinds)


def existing_bytes() -> int:
    """Bytes of every storage of this process."""
    from megatron_slm.memory.measure import existing_tensors
    from megatron_slm.memory.trace import Recorder

    gc.collect()
    recorder = Recorder()
    recorder.adopt(existing_tensors("cpu"))
    return sum(block.size for block in recorder.blocks)


def take_step(config: RunConfig, built: Any, plan: Any) -> None:
    """One step of a run, on random tokens."""
    from megatron_slm.stages import pretrain
    from megatron_slm.train.optimizer import apply_update, gradient_norm
    from megatron_slm.train.step import StepInput, forward_backward

    size, length = config.train.micro_batch_size, config.model.seq_length
    batches = []
    for _ in range(config.train.global_batch_size // (size * plan.groups.dp.size())):
        batch = {name: torch.randint(0, config.model.vocab_size or 1, (size, length)) for name in ("tokens", "labels")}
        batch |= {"position_ids": torch.arange(length).repeat(size, 1), "loss_mask": torch.ones(size, length)}
        batches.append(pretrain.local_batch(batch, plan))
    del batch
    cursor: Any = None  # which sample comes next is no question here
    forward_backward(built, plan, StepInput(batches, cursor))
    apply_update(built.optimizer, gradient_norm(built.optimizer))


def profiled_bytes(profiler: Any) -> int:
    """The most bytes that the leanest measured step had beside what it found, from the profiler's memory events.

    What a collective allocates for itself, gloo's threads release, where the profiler does not see it: it is over when
    the collective is (``settled``).
    """
    from torch._C._profiler import _EventType

    steps: list[tuple[int, int]] = []
    events: list[tuple[int, int, int, bool]] = []
    open_events = [(event, False) for event in profiler.profiler.kineto_results.experimental_event_tree()]
    while open_events:
        event, is_inside = open_events.pop()
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size, is_inside))
        elif event.name == STEP:
            steps.append((event.start_time_ns, event.end_time_ns))
        is_inside = is_inside or event.name.startswith(("c10d::", "gloo:"))
        open_events += [(child, is_inside) for child in event.children]
    events.sort()
    return min(_most([event for event in events if begin <= event[0] <= end]) for begin, end in steps)


def _most(events: list[tuple[int, int, int, bool]]) -> int:
    """The most bytes alive at once, beside those that were alive before the events."""
    alive: dict[int, tuple[int, bool]] = {}
    given_up: set[int] = set()
    current = peak = 0
    for _, pointer, size, is_inside in events:
        if not is_inside:
            passing = [key for key, (_, passes) in alive.items() if passes]
            current -= sum(alive.pop(key)[0] for key in passing)
            given_up.update(passing)
        if pointer in alive or size > 0 or pointer in given_up:
            current -= alive.pop(pointer, (0, False))[0]
            given_up.discard(pointer)
        else:
            current += size  # from before is released
        if size > 0:
            alive[pointer] = size, is_inside
            current += size
        peak = max(peak, current)
    return peak


def route_evenly() -> None:
    """Let every expert of this process get as many tokens as any other."""
    from megatron.core.transformer.moe import moe_utils

    from megatron_slm.parallel.dry import even_choice

    choose = moe_utils.topk_routing_with_score_function

    def route(logits: Tensor, topk: int, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        weights, _ = choose(logits, topk, *rest, **options)
        return weights, even_choice(logits.shape[0], logits.shape[1], topk)

    moe_utils.topk_routing_with_score_function = route


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Every collective is over, and forgotten by gloo's threads, when it returns.

    A tensor that such a thread is the last to refer to is released there, where the profiler does not see it.
    """
    from torch._C._distributed_c10d import FakeWork, ProcessGroup

    group: Any = ProcessGroup
    originals = {name: vars(group)[name] for name in QUEUED}  # what getattr gives would not bind again
    for name in QUEUED:
        setattr(group, name, _settling(getattr(group, name), FakeWork))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(group, name, original)


def _settling(collective: Callable[..., Any], done: Callable[[], Any]) -> Callable[..., Any]:
    def references(tensor: Tensor) -> int:
        storage: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
        return storage + int(tensor._use_count())

    def call(*args: Any, **options: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)]
        before = [references(tensor) for tensor in tensors]
        work = collective(*args, **options)
        work.wait()
        del work
        end = time.monotonic() + 5.0
        while any(references(tensor) > count for tensor, count in zip(tensors, before, strict=True)):
            if time.monotonic() > end:
                raise TimeoutError(f"gloo does not let go of the tensors of {collective.__name__}")
            time.sleep(0.0002)
        return done()

    return call
