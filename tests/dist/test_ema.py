"""Averaged weights: by hand, under every layout, through a checkpoint, and in the model's place for a while."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_slm.model.config import ModelConfig
from megatron_slm.train.config import PrecisionConfig
from tests import runs
from tests.breadth import BREADTH, widely
from tests.ranks import run_ranks
from tests.training import Task, build, global_tensors, mean_loss, micro_batches, worst_difference

DECAY = 0.9
FP32, BF16 = PrecisionConfig(), PrecisionConfig(bf16=True)
LLAMA = Task(iters=3)
TIED = replace(
    LLAMA,
    model=ModelConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        seq_length=32,
        position_embedding_type="learned_absolute",
        normalization="LayerNorm",
        swiglu=False,
        add_bias_linear=True,
        untie_embeddings_and_output_weights=False,
    ),
)
TP2: dict[str, Any] = {"tensor_model_parallel_size": 2}
PP2: dict[str, Any] = {"pipeline_model_parallel_size": 2}
VPP2: dict[str, Any] = PP2 | {"virtual_pipeline_model_parallel_size": 2}
REPLICATED: dict[str, Any] = {"use_distributed_optimizer": False}
OVERLAP: dict[str, Any] = {"overlap_param_gather": True, "ddp_bucket_size": 20000}


@dataclass
class Trained:
    """Losses; by global name the weights, the averages (in the model's format) and what stood there afterwards."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    averages: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    by_hand: list[torch.Tensor]
    found: list[torch.Tensor]


def train(task: Task, look: bool = True, save: Path | None = None) -> Trained:
    """Train with averages on this rank; ``look`` puts them into the model after every step."""
    from types import SimpleNamespace

    from megatron_slm.parallel.gradients import gathered_parameters, zero_gradients
    from megatron_slm.parallel.pipeline import run_schedule
    from megatron_slm.stages import pretrain
    from megatron_slm.train.ema import Ema
    from megatron_slm.train.optimizer import apply_update, gradient_norm, set_learning_rate
    from megatron_slm.train.optimizer_state import named_masters

    groups, chunks, optimizer = build(task)
    state: Any = SimpleNamespace(chunks=chunks, optimizer=optimizer)
    ema = Ema(optimizer, chunks, decay=DECAY, groups=groups)
    by_hand = [master.tensor.detach().double() for master in named_masters(optimizer, chunks)]
    losses = []

    def schedule(step: int, forward_only: bool) -> list[dict[str, torch.Tensor]]:
        batches, length = micro_batches(task, step, groups), task.model.seq_length
        return run_schedule(chunks, batches, pretrain.loss, forward_only=forward_only, seq_length=length, groups=groups)

    for step in range(task.iters):
        zero_gradients(chunks)
        optimizer.zero_grad()
        losses.append(mean_loss(schedule(step, False), groups))
        set_learning_rate(optimizer, task.optimizer.lr, task.optimizer.lr)
        apply_update(optimizer, gradient_norm(optimizer))
        ema.after_step(state, SimpleNamespace(skipped=False))  # type: ignore[arg-type]
        for average, master in zip(by_hand, named_masters(optimizer, chunks), strict=True):
            average.mul_(DECAY).add_(master.tensor.detach().double(), alpha=1 - DECAY)
        if look:
            with ema.applied(state), torch.no_grad():
                with gathered_parameters(chunks):
                    pass
                schedule(step, True)
    ema.after_step(state, SimpleNamespace(skipped=True))  # type: ignore[arg-type]
    with gathered_parameters(chunks):
        weights = global_tensors(chunks)
    with ema.applied(state):
        averages = global_tensors(chunks)
        found = [master.tensor.detach().double() for master in named_masters(optimizer, chunks)]
    after = global_tensors(chunks)
    if save is not None:
        write(ema, chunks, save)
    dist.barrier()
    return Trained(losses, weights, averages, after, by_hand, found)


def models(chunks: list[Any]) -> dict[str, Any]:
    from megatron_slm.parallel.gradients import unwrap

    return {f"model{index}": unwrap(chunk).sharded_state_dict() for index, chunk in enumerate(chunks)}


def write(ema: Any, chunks: list[Any], directory: Path) -> None:
    from megatron_slm.train import payload_write

    weights = models(chunks)
    payload = {**weights, "ema": ema.sharded_state(weights)}
    payload_write.write(payload_write.stage(payload, copy=False), directory, None)


@cache
def one_rank(task: Task) -> Trained:
    result: Trained = run_ranks(train, 1, task)[0]
    return result


@pytest.mark.parametrize(
    ("parallel", "precision"),
    [
        (OVERLAP, BF16),
        ({}, FP32),
        pytest.param(REPLICATED, BF16, marks=BREADTH),
        pytest.param(REPLICATED, FP32, marks=BREADTH),
    ],
)
def test_equals_an_average_by_hand(parallel: dict[str, Any], precision: PrecisionConfig) -> None:
    """Of the fp32 master weights; the skipped update at the end is not taken in."""
    for result in run_ranks(train, 2, replace(LLAMA.on(**parallel), precision=precision)):
        for found, expected in zip(result.found, result.by_hand, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
        assert any(not weight.equal(result.averages[name]) for name, weight in result.weights.items())


LAYOUTS = {
    "tp2-sp": (LLAMA, 2, TP2 | {"sequence_parallel": True}),
    "dp2-no-distributed-optimizer": (LLAMA, 2, REPLICATED),
    "tied-pp2-vpp2-dp2": (TIED, 4, VPP2),
    "tied-tp2-dp2-overlap": (TIED, 4, TP2 | OVERLAP),
}


@pytest.mark.parametrize("layout", widely(LAYOUTS, "tp2-sp", "tied-pp2-vpp2-dp2"))
def test_every_layout_has_the_same_averages(layout: str) -> None:
    task, world_size, degrees = LAYOUTS[layout]
    found, expected = run_ranks(train, world_size, task.on(**degrees))[0], one_rank(task)
    error, name = worst_difference(found.averages, expected.averages)
    assert error <= 1e-6, f"{name} differs by {error:.2e}"  # core clips by a norm in fp32
    assert all(found.after[name].equal(weight) for name, weight in found.weights.items())


@pytest.mark.parametrize(
    ("parallel", "precision"),
    [
        (OVERLAP, BF16),
        pytest.param(REPLICATED, BF16, marks=BREADTH),
        pytest.param(REPLICATED, FP32, marks=BREADTH),
        (VPP2, FP32),
    ],
)
def test_training_does_not_notice_that_averages_are_used(parallel: dict[str, Any], precision: PrecisionConfig) -> None:
    task = replace(LLAMA.on(**parallel), precision=precision)
    looked, not_looked = (run_ranks(train, 2, task, look)[0] for look in (True, False))
    assert looked.losses == not_looked.losses
    for name, weight in not_looked.weights.items():
        assert weight.equal(looked.weights[name]) and weight.equal(looked.after[name]), name


def read(task: Task, directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Averages of a checkpoint, read as such into a new state and in the weights' place into a model."""
    from types import SimpleNamespace

    from megatron.core import dist_checkpointing

    from megatron_slm.parallel.gradients import unwrap
    from megatron_slm.train.ema import Ema, ema_request

    groups, chunks, optimizer = build(task)
    state: Any = SimpleNamespace(chunks=chunks, optimizer=optimizer)
    ema = Ema(optimizer, chunks, decay=DECAY, groups=groups)
    request = {"ema": ema.sharded_state(models(chunks))}
    ema.load(dist_checkpointing.load(request, str(directory), validate_access_integrity=False)["ema"])
    ema.before_run(state)
    with ema.applied(state):
        as_part = global_tensors(chunks)
    loaded = dist_checkpointing.load(ema_request(models(chunks)), str(directory), validate_access_integrity=False)
    for chunk, entries in zip(chunks, loaded.values(), strict=True):
        unwrap(chunk).load_state_dict(entries)
    as_weights = global_tensors(chunks)
    dist.barrier()
    return as_part, as_weights


MOVES = {
    "dp2-to-tp2": (LLAMA, FP32, 2, {}, 2, TP2),
    "one-to-tp2-dp2": (LLAMA, BF16, 1, {}, 4, TP2 | OVERLAP),
    "tied-pp2-vpp2-to-one": (TIED, BF16, 2, VPP2, 1, REPLICATED),
    "tied-dp2-to-pp2": (TIED, FP32, 2, OVERLAP, 2, PP2),
}


@pytest.mark.parametrize("move", widely(MOVES, "dp2-to-tp2", "tied-pp2-vpp2-to-one"))
def test_a_checkpoint_gives_every_layout_the_same_bits(tmp_path: Path, move: str) -> None:
    task, precision, world_size, before, new_world_size, after = MOVES[move]
    task = replace(task, precision=precision)
    saved = run_ranks(train, world_size, task.on(**before), False, tmp_path)[0]
    as_part, as_weights = run_ranks(read, new_world_size, task.on(**after), tmp_path)[0]
    for name, average in saved.averages.items():
        assert average.equal(as_part[name]) and average.equal(as_weights[name]), name


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


EMA, ITERS = "train.ema_decay=0.5", "train.train_iters=6"
DP2 = ("precision.bf16=true", "parallel.overlap_param_gather=true", "train.eval_interval=2")


def test_a_run_keeps_validates_and_resumes_its_averages(tmp_path: Path, data: Path) -> None:
    """Bitwise, and the training is the one without averages."""
    plain, straight, resumed = (tmp_path / name for name in ("plain", "straight", "resumed"))
    assert runs.train(plain, data, 2, ITERS, *DP2) == 0
    assert runs.train(straight, data, 2, ITERS, *DP2, EMA) == 0
    assert runs.train(resumed, data, 2, ITERS, *DP2, EMA, "train.exit_interval=3") == 75
    assert runs.train(resumed, data, 2, ITERS, *DP2, EMA) == 0
    assert runs.losses(plain) == runs.losses(straight) == runs.losses(resumed)
    contents = [runs.contents(runs.checkpoint_path(run, 6)) for run in (plain, straight, resumed)]
    assert runs.differences(contents[1], contents[2]) == []
    averages = {key.removeprefix("ema."): value for key, value in contents[1].items() if key.startswith("ema.")}
    weights = {key: contents[0][f"optimizer.state.param.{key}"] for key in averages}
    assert len(averages) > 5 and all(value.dtype == torch.float32 for value in averages.values())
    assert not runs.differences(weights, {key: contents[1][f"optimizer.state.param.{key}"] for key in averages})
    assert len(runs.differences(weights, averages)) == len(averages)
    validations = runs.records(straight, "validation.jsonl")
    assert [record["step"] for record in validations] == [0, 2, 4, 6]
    assert validations[0]["lm_loss_ema"] == validations[0]["lm_loss"]
    assert all(record["lm_loss_ema"] != record["lm_loss"] for record in validations[1:])


def test_averages_begin_with_the_weights_that_were_loaded(tmp_path: Path, data: Path) -> None:
    """A run that gets them at step 2, under another layout, and one from another run's weights."""
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    assert runs.train(run, data, 2, "train.train_iters=2", "parallel.tensor_model_parallel_size=2") == 0
    assert runs.train(run, data, 1, "train.train_iters=3", EMA) == 0
    before, after = (runs.contents(runs.checkpoint_path(run, step)) for step in (2, 3))
    assert "holds no ema: it starts from the loaded weights" in (run / "log.txt").read_text()
    for key in (key for key in after if key.startswith("ema.")):
        weights = [contents[key.removeprefix("ema.")] for contents in (before, after)]
        torch.testing.assert_close(after[key], (weights[0] + weights[1]) / 2)
    start = f"checkpoint.pretrained_checkpoint={run}"
    assert runs.train(tuned, data, 1, "train.train_iters=0", EMA, start) == 0
    contents = runs.contents(runs.checkpoint_path(tuned, 0))
    assert all(contents[key].equal(after[key.removeprefix("ema.")]) for key in contents if key.startswith("ema."))


def said(run: Path, ema: bool) -> str:
    """What ``mslm generate`` says, in the process of a rank that has left its world."""
    from megatron_slm.run_generate import Manner, generate

    dist.destroy_process_group()
    return "".join(generate(run, "def ", Manner(max_new_tokens=8, seed=3, ema=ema)))


def test_generate_takes_the_averages(tmp_path: Path, data: Path) -> None:
    """With the first weights as averages (a decay of nearly 1) it says what the untrained model says."""
    untrained, trained = tmp_path / "untrained", tmp_path / "trained"
    assert runs.train(untrained, data, 1, "train.train_iters=0") == 0
    fast = ("optimizer.lr=1e-1", "schedule.lr_decay_style=constant", "train.train_iters=4")
    assert runs.train(trained, data, 1, *fast, "train.ema_decay=0.9999999") == 0
    first, last, average = (
        run_ranks(said, 1, run, ema)[0] for run, ema in ((untrained, False), (trained, False), (trained, True))
    )
    assert first and first == average != last
    command = [sys.executable, "-m", "megatron_slm.cli", "generate", str(untrained), "--prompt", "def ", "--ema"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and "holds no averaged weights" in refused.stderr
    assert "Traceback" not in refused.stderr and refused.stdout == ""
