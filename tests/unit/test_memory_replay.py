"""The replay of one micro-batch's trace is what a whole step of core's schedule allocates."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_slm.config.run_config import RunConfig
from megatron_slm.parallel import device
from tests.axes import case, config_of

device.preload("cpu")

import torch  # noqa: E402

from megatron_slm import run, run_model  # noqa: E402
from megatron_slm.memory.rank import RankTrace  # noqa: E402
from megatron_slm.memory.replay import alive_at_worst, effective, replay  # noqa: E402
from megatron_slm.memory.trace import Phase, Recorder  # noqa: E402
from megatron_slm.parallel.dry import dry_world  # noqa: E402
from megatron_slm.run_dry import job_trace  # noqa: E402
from megatron_slm.train.step import StepInput, forward_backward  # noqa: E402
from tests.memory_step import take_step  # noqa: E402


def shaped(**values: str) -> RunConfig:
    """A case of ``tests.axes`` in fp32, larger than what a step keeps beside its tensors, of few micro-batches."""
    config = config_of(case(**values))
    micro_batches = 4 if "pp" in values else 2
    train = dataclasses.replace(config.train, global_batch_size=micro_batches * int(values.get("dp", "1")))
    return dataclasses.replace(
        config,
        train=train,
        model=dataclasses.replace(config.model, seq_length=64, hidden_size=64, ffn_hidden_size=128),
        precision=dataclasses.replace(config.precision, fp64=False),
    )


def stepped(config: RunConfig, rank: int) -> tuple[int, int]:
    """Bytes between steps, and the most in a second whole step, recorded in the dry world."""
    world = config.parallel.world_size or 1
    with dry_world(config.parallel, rank=rank, world_size=world) as groups, Recorder() as recorder:
        built: Any = run_model.build_model(config, groups, torch.device("cpu"), config.model.vocab_size or 0)
        static = current = sum(recorder.blocks[number].size for number in recorder.alive())
        plan = run.step_plan(config, groups, torch.device("cpu"))
        take_step(config, built, plan)
        recorder.phase = Phase()
        current = sum(recorder.blocks[number].size for number in recorder.alive())
        take_step(config, built, plan)
        peak = current
        for event in recorder.phase.events:
            current += recorder.blocks[event].size if event >= 0 else -recorder.blocks[~event].size
            peak = max(peak, current)
    return static, peak


CASES: list[dict[str, str]] = [
    {},
    {"tp": "2", "sp": "on", "recompute": "attention", "embeddings": "tied"},
    {"pp": "4"},
    {"pp": "2", "vpp": "2", "positions": "learned"},
    {"pp": "2", "vpp": "2", "mlp": "experts", "ep": "2", "dp": "2", "recompute": "experts", "mtp": "1"},
    {"cp": "2", "attention": "latent", "recompute": "latents"},
    {"tp": "2", "sp": "on", "mlp": "capacity", "ep": "2", "dp": "2", "etp": "1"},
    {"pp": "2", "recompute": "uniform", "objective": "smoothed", "clipping": "on", "optimizer": "replicated"},
]


@pytest.mark.parametrize("values", CASES, ids=lambda values: "-".join(f"{k}_{v}" for k, v in values.items()) or "plain")
def test_replay_is_the_whole_step(values: dict[str, str]) -> None:
    config = shaped(**values)
    for rank in {0, (config.parallel.world_size or 1) - 1} if "pp" in values else {0}:
        static, peak = stepped(config, rank)
        trace = traced(config, rank)
        timeline = replay(trace)
        assert timeline.static_bytes == static
        assert timeline.peak_bytes == pytest.approx(peak, rel=0.005)
        alive = alive_at_worst(trace, timeline)
        assert static + sum(trace.blocks[number].size * copies for number, copies in alive.items()) == (
            timeline.peak_bytes
        )


def traced(config: RunConfig, rank: int) -> RankTrace:
    """The trace without what gloo would allocate: a fake process group allocates nothing."""
    from megatron_slm.memory.rank import trace_rank

    return trace_rank(
        config,
        run_model.build_model,
        run.step_plan,
        rank=rank,
        world_size=config.parallel.world_size or 1,
        vocab_size=config.model.vocab_size or 0,
    )


def test_more_micro_batches_need_no_new_trace() -> None:
    config = shaped(pp="2")
    few = dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch_size=2))
    assert replay(traced(few, 0), 4).peak_bytes == replay(traced(config, 0)).peak_bytes


def test_a_persistent_block_is_a_place() -> None:
    """Two passes that empty it empty it once; one that fills it replaces what is there."""
    place = frozenset({7})
    assert effective([1, ~7], place, place) == ([1, ~7], frozenset())
    assert effective([1, ~7], place, frozenset()) == ([1], frozenset())
    assert effective([7, 1], place, frozenset()) == ([7, 1], place)
    assert effective([1, 7], place, place) == ([~7, 1, 7], place)
    assert effective([7, ~7], place, place) == ([7, ~7], place)


def test_the_loss_is_cut_as_in_a_run() -> None:
    """Nothing of the loss depends on a value: half of the tokens are one chunk of logits, as on real ranks."""
    trace = job_trace(shaped(), 0, world_size=1, for_gpu=False)
    logits = [block for block in trace.blocks if block.module == "output_layer" and block.op == "aten.mm"]
    assert max(block.size for block in logits) >= 32 * 512 * 4


def test_recorder_follows_real_tensors_and_their_storages() -> None:
    with Recorder() as recorder:
        kept = torch.ones(100)
        view = kept.view(10, 10)
        released = torch.ones(50)
        del released
        kept.untyped_storage().resize_(0)
        emptied = recorder.number(kept)
        kept.untyped_storage().resize_(800)
    sizes = [recorder.blocks[event].size if event >= 0 else -recorder.blocks[~event].size
             for event in recorder.phase.events]  # fmt: skip
    assert sizes == [400, 200, -200, -400, 800]
    assert emptied is None and recorder.number(view) == 2


def test_recorder_leaves_everything_as_it_was() -> None:
    resize = torch.UntypedStorage.resize_
    hooks = torch.nn.modules.module._global_forward_hooks
    with Recorder():
        assert torch.UntypedStorage.resize_ is not resize and hooks
    assert torch.UntypedStorage.resize_ is resize and not hooks


def test_forward_backward_is_what_is_traced() -> None:
    """``take_step`` of the tests is the step of a run: its parts are called by their names."""
    assert forward_backward.__module__ == "megatron_slm.train.step" and StepInput._fields == ("micro_batches", "cursor")
