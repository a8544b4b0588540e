"""What a run does about a bad batch, through the real loop: warn, stop, skip, roll back, and the bound on all of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.ranks import RankFailure

DP2 = "train.micro_batch_size=2"
WATCHED = (
    "train.spike_window=8",
    "train.train_iters=16",
    "train.eval_iters=0",
    "checkpoint.save_interval=5",
    "schedule.lr_decay_style=constant",
    "optimizer.lr=3e-3",
)
BAD_STEP = 12
FIRST_BAD_SAMPLE = (BAD_STEP - 1) * 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


def spoil(change: Callable[[dict[str, Any]], None], first: int, last: int) -> None:
    """Let the loader give spoiled batches for steps that begin at samples ``first`` .. ``last``."""
    from megatron_slm.data.loader import TrainLoader

    original = TrainLoader.micro_batches

    def spoiled(self: Any, cursor: Any, size: int) -> Any:
        for batch in original(self, cursor, size):
            if first <= cursor.consumed_samples <= last:
                change(batch)
            yield batch

    TrainLoader.micro_batches = spoiled  # type: ignore[method-assign]


def unlikely_labels(batch: dict[str, Any]) -> None:
    """Control characters' byte pieces never follow anything in the corpus: the loss jumps."""
    batch["labels"].fill_(7)


def infinite_mask(batch: dict[str, Any]) -> None:
    batch["loss_mask"][0, 0] = float("inf")


def spoil_weights_before_a_save() -> None:
    """A weight of every rank turns NaN after step 10, just before that step's checkpoint is taken; only once."""
    from megatron_slm import run
    from megatron_slm.train.hook import Hook

    class Once(Hook):
        struck = False

        def after_step(self, state: Any, result: Any) -> None:
            if result.step == 10 and not self.struck:
                self.struck = True
                masters = state.optimizer.param_groups[0]["params"]
                for tensor in (*masters, *state.chunks[0].parameters()):
                    tensor.data.view(-1)[:1] = float("nan")

    build = run.build_hooks
    run.build_hooks = lambda *rest, **options: [Once(), *build(*rest, **options)]


spike = partial(spoil, unlikely_labels, FIRST_BAD_SAMPLE, FIRST_BAD_SAMPLE)
non_finite = partial(spoil, infinite_mask, FIRST_BAD_SAMPLE, FIRST_BAD_SAMPLE)
endless = partial(spoil, infinite_mask, FIRST_BAD_SAMPLE, 10**9)


def test_a_spike_is_said_and_applied_by_default(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    assert runs.train(run, data, 2, *WATCHED, plant=spike) == 0
    log = (run / "log.txt").read_text()
    assert log.count("warning: step 12: the ") == 1 and "The update was applied" in log
    assert not any(record["skipped"] for record in runs.records(run))


def test_a_skipped_batch_changes_nothing_but_the_position(tmp_path: Path, data: Path) -> None:
    """The step after the skipped one has the loss of weights that never saw the batch."""
    run = tmp_path / "run"
    assert runs.train(run, data, 2, *WATCHED, "train.spike_policy=skip", plant=spike) == 0
    records = runs.records(run)
    assert [record["step"] for record in records if record["skipped"]] == [BAD_STEP]
    assert [record["step"] for record in records] == list(range(1, 17))
    assert records[-1]["consumed_samples"] == 16 * 8
    assert "Its batch is skipped (intervention 1)" in (run / "log.txt").read_text()
    before, after = records[BAD_STEP - 2]["lm_loss"], records[BAD_STEP]["lm_loss"]
    assert abs(after - before) < 0.3 < records[BAD_STEP - 1]["lm_loss"] - before


def test_a_roll_back_goes_to_the_checkpoint_and_passes_over_the_batch(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    rollback = ("train.non_finite_policy=rollback", "parallel.overlap_grad_reduce=true", DP2)
    assert runs.train(run, data, 2, *WATCHED, *rollback, plant=non_finite) == 0
    records = runs.records(run)
    assert [record["step"] for record in records] == list(range(1, 17)), "every step exactly once"
    assert records[9]["skipped_samples"] == 0 and records[10]["skipped_samples"] == 16
    # Steps 11 and 12 had consumed 16 samples after the checkpoint of step 10.
    assert records[10]["consumed_samples"] == 10 * 8 + 16 + 8
    log = (run / "log.txt").read_text()
    assert "Rolled back to" in log and "iter_0000010" in log
    assert "Rolled back\tIteration: 10" in (run / "progress.txt").read_text()
    # The run that knew beforehand: resumed from step 10 with the same samples passed over, it has the same losses.
    assert runs.train(run, data, 2, *WATCHED, *rollback, "train.train_iters=18") == 0
    assert runs.records(run)[-1]["skipped_samples"] == 16


def test_weights_that_are_not_finite_never_displace_a_checkpoint(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    rollback = ("train.non_finite_policy=rollback", "train.max_interventions=1", "checkpoint.keep_last=1")
    assert runs.train(run, data, 2, *WATCHED, *rollback, plant=spoil_weights_before_a_save) == 0
    log = (run / "log.txt").read_text()
    assert "It is in the weights that step 11 began with" in log
    assert "iter_0000005" in log and "no checkpoint is made of them" in log
    records = runs.records(run)
    assert [record["step"] for record in records] == list(range(1, 17))
    assert records[5]["skipped_samples"] == 11 * 8 - 5 * 8


def test_interventions_end(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    policy = ("train.non_finite_policy=skip", "train.max_interventions=2")
    with pytest.raises(RankFailure, match="used up train.max_interventions = 2") as failure:
        runs.train(run, data, 1, *WATCHED, *policy, plant=endless)
    assert failure.value.code == 1 and "Traceback" not in str(failure.value)
    assert [record["step"] for record in runs.records(run) if record["skipped"]] == [12, 13]


def test_a_roll_back_without_checkpoints_is_refused_at_the_start(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RankFailure, match="checkpoint.save_interval") as failure:
        runs.train(run, data, 1, "train.spike_policy=rollback")
    assert failure.value.code == 2 and not run.exists()


def test_a_run_that_ends_with_weights_that_are_not_finite_fails(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RankFailure, match="after step 10 weights or optimizer hold values") as failure:
        runs.train(run, data, 2, *WATCHED, "train.train_iters=10", plant=spoil_weights_before_a_save)
    assert failure.value.code == 1 and "Traceback" not in str(failure.value)
    assert "error: after step 10" in (run / "log.txt").read_text()
    assert "Ending job\tExit code: 1" in (run / "progress.txt").read_text()
    assert runs.train(run, data, 2, *WATCHED, "train.train_iters=10") == 0
    assert [record["step"] for record in runs.records(run)] == list(range(1, 11))


def test_skipping_ends_where_the_weights_are_bad(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RankFailure, match="Skipping batches cannot mend that"):
        runs.train(run, data, 1, *WATCHED, "train.non_finite_policy=skip", plant=spoil_weights_before_a_save)


def test_a_roll_back_without_a_whole_checkpoint_says_both(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    rollback = ("train.non_finite_policy=rollback",)
    assert runs.train(run, data, 2, *WATCHED, *rollback, "train.train_iters=10") == 0
    with pytest.raises(RankFailure, match=r"step 12: .*micro-batch 0.*could not be rolled back: .*no whole") as failure:
        runs.train(run, data, 2, *WATCHED, *rollback, plant=partial(damage_and_spoil, run))
    assert failure.value.code == 1 and "Traceback" not in str(failure.value)


def damage_and_spoil(run: Path) -> None:
    """All checkpoints are damaged once the run has read them; step 12 is not finite."""
    from megatron_slm.train import origin

    restore = origin._resume

    def then_damage(*arguments: Any) -> list[str]:
        words = restore(*arguments)
        for file in (run / "checkpoints").glob("iter_*/common.pt"):
            file.write_bytes(b"")
        return words

    origin._resume = then_damage
    non_finite()
