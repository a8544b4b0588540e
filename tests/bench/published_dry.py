"""Memory of published runs in the dry world: the measured program's kernels and options, its judged rank.

``device.preload("cpu")`` comes before this is imported, as before all of core.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from megatron_slm import run, run_model
from megatron_slm.config.run_config import RunConfig
from megatron_slm.memory.capacity import Surroundings
from megatron_slm.memory.ledger import Row, ledger
from megatron_slm.memory.rank import RankTrace, trace_rank
from megatron_slm.memory.replay import replay
from megatron_slm.memory.roles import communicators
from megatron_slm.memory.routing import hottest, with_hot_experts
from megatron_slm.memory.trace import COPIES
from megatron_slm.model.core_config import transformer_config
from megatron_slm.parallel import declared
from megatron_slm.parallel.declared_loss import use_loss
from megatron_slm.parallel.declared_ops import (
    PERSISTENT,
    TORCH_THREADS,
    TORCH_WORKSPACE_BYTES,
    Generation,
    Kernels,
)
from megatron_slm.parallel.gradients import unwrap
from megatron_slm.plan.cluster import cluster_of
from tests.bench.published import GPUS, Case, Target
from tests.bench.published_plain import build_plain
from tests.bench.published_static import MIB, shared_buffer

FEW_LAYERS, MANY_LAYERS = (2, 3), 4
"""Layers of a stage that are traced in the place of more than so many."""

DETERMINISTIC_WORKSPACE = 32 * MIB
"""Of one cuBLAS handle of torch with CUBLAS_WORKSPACE_CONFIG=:4096:8."""

FULLEST = 1.17
"""Tokens of a rank's experts over an even share, in the fullest micro-batch of a run: the one constant of the memory
that is fitted. The mean of what 40 of Megatron's functional tests up to 8 GiB imply (two more, whose peaks are a third
above those of tests of the same configuration, left out); a router that begins untrained is never even."""


class Predicted(NamedTuple):
    """Bytes of the judged rank.

    Attributes:
        static: allocated between steps.
        peak: the most that is allocated.
        low, high: of the device's memory at that moment, context and communicators among it; 0 where a peak was
            measured, which is allocated bytes.
        stage: of the pipeline; the one whose peak is the largest where none is named.
    """

    static: int
    peak: int
    low: int
    high: int
    stage: int

    def verdict(self, capacity: int) -> str:
        """``fits``, ``tight`` or ``does not fit``, as ``mslm memory`` says it."""
        if self.low > capacity:
            return "does not fit"
        return "fits" if self.high <= capacity else "tight"


def predict_memory(case: Case) -> Predicted:
    """The judged stage of a case, or the fullest."""
    wanted = case.judged_stage
    last = case.config.parallel.pipeline_model_parallel_size - 1
    # Of the stages between the first and the last none is fuller than the first, which has more in flight.
    stages = [wanted] if wanted is not None else sorted({0, last})
    return max((_of_stage(case, stage) for stage in stages), key=lambda predicted: (predicted.high, predicted.peak))


def _of_stage(case: Case, stage: int) -> Predicted:
    """A stage as it is; of AlephLayouts' many rows, from two with few of their equal layers."""
    parallel = case.config.parallel
    places = parallel.pipeline_model_parallel_size * parallel.vpp_size
    layers = case.config.model.num_layers // places
    if case.target.engine != "plain" or layers <= MANY_LAYERS:
        return _traced(case, stage)
    few, more = (_traced(_with_layers(case, count * places), stage) for count in FEW_LAYERS)
    further = (layers - FEW_LAYERS[0]) / (FEW_LAYERS[1] - FEW_LAYERS[0])
    sizes = {name: round(value + further * (getattr(more, name) - value)) for name, value in few._asdict().items()}
    return Predicted(**sizes)._replace(stage=stage)


def _with_layers(case: Case, layers: int) -> Case:
    return dataclasses.replace(case, values={**case.values, "model.num_layers": layers})


def _traced(case: Case, stage: int) -> Predicted:
    lasting: dict[Any, int] = {}
    trace = trace_stage(case, stage, lasting)
    beside = _beside(case) if case.target.engine != "plain" else 0
    timeline = replay(trace)
    copies = sum(trace.blocks[number].size for number in trace.persistent if trace.blocks[number].kind == COPIES)
    static = sum(part.size for part in trace.static) + copies + sum(lasting.values()) + shared_buffer(case) + beside
    if trace.exchanged is not None:  # each chunk keeps its last input and the gradient of that (core: set_input_tensor)
        static += timeline.moments[-1].exchanged * trace.blocks[trace.exchanged].size
    low = high = 0
    if case.measured("peak_mem_gib") is None:
        surroundings = Surroundings(capacity_bytes(case.gpu), communicators(case.config.parallel, case.world_size))
        whole = ledger(trace, timeline, surroundings)
        low, high = whole.low, whole.high
    elif hottest(case.config) > 1:
        beside += uneven(ledger(trace, timeline).rows, case.config)
    return Predicted(static, timeline.peak_bytes + beside, low, high, stage)


def uneven(rows: Sequence[Row], config: RunConfig) -> int:
    """Bytes beyond those of even shares in the fullest micro-batch of a run; ``rows`` are of the worst moment."""
    routed = sum(hot.high - row.high for hot, row in zip(with_hot_experts(rows, config), rows, strict=True))
    return round(routed * (min(FULLEST, hottest(config)) - 1) / (hottest(config) - 1))


def capacity_bytes(gpu: str) -> int | None:
    """What torch sees of a GPU named as in the rows; None where it is not known."""
    name = GPUS.get(gpu.partition("-")[0])
    return round(cluster_of(name).memory_bytes) if name is not None else None


def trace_stage(case: Case, stage: int, lasting: dict[Any, int]) -> RankTrace:
    """The last rank of a pipeline stage.

    Args:
        lasting: is given the bytes of what the kernels allocate once and keep, by what it is.
    """
    size = case.world_size // case.config.parallel.pipeline_model_parallel_size
    return trace_rank(
        case.config,
        _builder(case),
        run.step_plan,
        rank=(stage + 1) * size - 1,
        world_size=case.world_size,
        vocab_size=case.config.model.vocab_size or 0,
        kernels=contextlib.nullcontext
        if case.target.engine == "plain"
        else partial(_watched, kernels_of(case), lasting),
    )


@contextlib.contextmanager
def _watched(kernels: Kernels, lasting: dict[Any, int]) -> Iterator[None]:
    with declared.declared_kernels(kernels):
        yield
        lasting.update({key: tensor.untyped_storage().nbytes() for key, tensor in PERSISTENT.items()})


def kernels_of(case: Case) -> Kernels:
    """What the measured program runs, as the dry world names it."""
    losses = {"te": "te", "core": "core", "core-fused": "core fused"}
    built_for = generation(case.gpu)
    # Where both can be imported TE prefers flash-attention on Ampere, cuDNN's from Hopper on (dot_product_attention
    # utils.py, get_attention_backend).
    preferred = "flash" if built_for == "ampere" else "fused"
    return Kernels(
        loss=losses[case.target.loss],  # type: ignore[arg-type]
        attention=preferred if case.target.attention == "auto" else case.target.attention,  # type: ignore[arg-type]
        generation=built_for,
        keeps_dummy_gradients=case.target.cached_gradients,
    )


def _builder(case: Case) -> Any:
    if case.target.engine == "plain":
        return partial(build_plain, fused_norm=case.target.fused_norm)
    return partial(_built, target=case.target)


def generation(gpu: str) -> Generation:
    """Architecture of a GPU by its name."""
    return "ampere" if gpu.startswith("A100") else "blackwell" if "B200" in gpu or "B300" in gpu else "hopper"


def _built(
    config: RunConfig, groups: Any, device: torch.device, vocab_size: int, *, target: Target
) -> run_model.BuiltModel:
    """``run_model.build_model`` as the measured program builds it."""
    core = transformer_config(config.model, config.parallel, config.precision, config.train, device="cuda")
    options = {**declared.declared_options(config.model, published=True), **dict(target.options)}
    if config.parallel.context_parallel_size == 1:
        options.pop("cp_comm_type", None)
    for name, value in options.items():
        setattr(core, name, value)
    spec, norm = declared.declared_spec(config.model, config.data.reset_attention_mask)
    layers = run_model.Layers(core, spec, norm, "layers: as they are declared")
    built = run_model.assemble_model(config, groups, device, vocab_size, layers=layers)
    use_loss([unwrap(chunk) for chunk in built.chunks])
    return built


def _beside(case: Case) -> int:
    """What the dry world has no word for: a deterministic run's larger workspaces."""
    workspace = TORCH_WORKSPACE_BYTES[generation(case.gpu)]
    larger = max(DETERMINISTIC_WORKSPACE - workspace, 0) * TORCH_THREADS if case.target.deterministic else 0
    return larger
