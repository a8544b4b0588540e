"""What a run writes: Megatron's console line and tags, one record a step, and a resume that repeats none."""

from __future__ import annotations

import json
import math
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_slm.errors import LogError, NonFiniteError
from megatron_slm.train.config import LogConfig
from megatron_slm.train.console import iteration_line, validation_lines
from megatron_slm.train.hook import StepResult, StepTimes
from megatron_slm.train.memory_use import memory_source
from megatron_slm.train.metrics import Throughput, read_records, truncate_records
from megatron_slm.train.metrics_writer import MetricsWriter

SEQ_LENGTH, BATCH = 16, 4
TIMES = StepTimes(data=0.001, forward_backward=0.05, optimizer=0.009, total=0.0625, checkpoint=0.5)


def result(step: int, **changes: Any) -> StepResult:
    fields: dict[str, Any] = {
        "step": step,
        "consumed_samples": step * BATCH,
        "consumed_tokens": step * BATCH * SEQ_LENGTH,
        "loss": 6.0 + 0.1 * step,
        "num_tokens": 60,
        "grad_norm": 1.2344,
        "learning_rate": 3e-4,
        "batch_size": BATCH,
        "times": TIMES,
        "skipped": False,
        "sample_digest": f"digest{step}",
    }
    return StepResult(**{**fields, **changes})


def writer(directory: Path, *, step: int = 0, train_iters: int = 10, **log: Any) -> MetricsWriter:
    directory.mkdir(exist_ok=True)
    return MetricsWriter(
        directory,
        LogConfig(**{"log_interval": 2, **log}),
        step=step,
        train_iters=train_iters,
        seq_length=SEQ_LENGTH,
        throughput=Throughput(flops_per_token=1e9, world_size=2),
        memory=memory_source("cpu"),
    )


def test_the_console_line_is_megatrons() -> None:
    line = iteration_line(
        [result(1, loss=6.0), result(2, loss=7.0)],
        train_iters=500,
        tflops_per_second=1.25,
        now=datetime(2026, 1, 2, 3, 4, 5, 678),
    )
    assert line == (
        " [2026-01-02 03:04:05.000678] iteration        2/     500 | consumed samples:            8 |"
        " elapsed time per iteration (ms): 62.5 | throughput per GPU (TFLOP/s/GPU): 1.2 |"
        " learning rate: 3.000000E-04 | global batch size:     4 | lm loss: 6.500000E+00 | loss scale: 1.0 |"
        " grad norm: 1.234 | number of skipped iterations:   0 | number of nan iterations:   0 |"
    )


def test_skipped_and_nan_steps_are_counted_and_do_not_enter_the_loss() -> None:
    results = [result(1, loss=2.0), result(2, loss=math.nan, skipped=True), result(3, loss=math.nan)]
    line = iteration_line(results, train_iters=3, tflops_per_second=0.0, now=datetime.now())
    assert "lm loss: 2.000000E+00 |" in line
    assert "skipped iterations:   1 |" in line and "nan iterations:   2 |" in line


def test_the_validation_lines_are_megatrons() -> None:
    frame, line, again = validation_lines(2.0, where="iteration 100")
    assert line == " validation loss at iteration 100 | lm loss value: 2.000000E+00 | lm loss PPL: 7.389056E+00 | "
    assert frame == again == "-" * (len(line) + 1)
    assert "PPL: 4.851652E+08" in validation_lines(50.0, where="x")[1]  # exp(20)


def test_one_record_a_step_with_the_exact_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = writer(tmp_path / "run")
    log.before_run(None)
    losses = [0.1 + 0.2, 1e-300, 3.0]
    for step, loss in enumerate(losses, start=1):
        log.after_step(None, result(step, loss=loss))
    written = read_records(tmp_path / "run" / "metrics.jsonl")  # before anything is closed
    assert [record["step"] for record in written] == [1, 2, 3]
    assert [record["lm_loss"] for record in written] == losses
    assert [float.fromhex(record["lm_loss_bits"]) for record in written] == losses
    first = written[0]
    assert first["tokens"] == BATCH * SEQ_LENGTH and first["loss_tokens"] == 60
    assert first["tokens_per_second"] == pytest.approx(64 / 0.0625)
    assert first["tflops_per_second"] == pytest.approx(64 * 1e9 / (0.0625 * 2 * 1e12))
    assert first["mfu"] is None, "a CPU has no published peak"
    assert first["memory_bytes"] > 1 << 20
    assert (first["data_ms"], first["forward_backward_ms"], first["optimizer_ms"]) == (1.0, 50.0, 9.0)
    assert (first["step_ms"], first["checkpoint_ms"], first["sample_digest"]) == (62.5, 500.0, "digest1")
    log.after_run(None, 0)
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "run" / "log.txt").read_text()
    assert re.findall(r"iteration +(\d+)/", printed) == ["2", "3"], "at the interval, and what was left at the end"


def test_a_loss_that_is_no_number_stays_valid_json(tmp_path: Path) -> None:
    log = writer(tmp_path)
    log.after_step(None, result(1, loss=math.nan, grad_norm=math.inf, skipped=True))
    log.after_run(None, 1)
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["lm_loss"] is None and record["lm_loss_bits"] == "nan" and record["grad_norm"] is None
    assert record["skipped"] is True


def test_tensorboard_has_megatrons_tags(tmp_path: Path) -> None:
    log = writer(tmp_path, log_interval=1)
    log.after_step(None, result(1))
    log.after_step(None, result(2))
    log.validation(2.0, tokens=100, step=2, consumed_samples=8)
    log.after_run(None, 0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    plain = {"learning-rate", "batch-size", "loss-scale", "grad-norm", "iteration-time", "throughput", "world-size"}
    plain |= {"lm loss", "lm loss validation", "lm loss validation ppl", "mem-resident-bytes"}
    assert plain | {f"{tag} vs samples" for tag in plain} <= tags
    assert [(point.step, round(point.value, 4)) for point in events.Scalars("lm loss")] == [(1, 6.1), (2, 6.2)]
    assert [point.step for point in events.Scalars("lm loss vs samples")] == [4, 8]
    assert events.Scalars("lm loss validation ppl")[0].value == pytest.approx(math.exp(2.0))
    (validation,) = read_records(tmp_path / "validation.jsonl")
    assert validation == {
        "step": 2, "consumed_samples": 8, "lm_loss": 2.0, "lm_loss_bits": (2.0).hex(), "loss_tokens": 100,
    }  # fmt: skip


@pytest.mark.parametrize(
    "tail",
    [b"", b"\x30", b"\x30" + bytes(11) + b"torn", b"\x04" + bytes(11) + b"\xff\xff\xff\xff" + bytes(4), bytes(64)],
    ids=["whole", "torn header", "torn event", "no event", "zeros"],
)
@pytest.mark.parametrize("steps", [5, 7])
def test_a_resume_leaves_no_step_twice_in_tensorboard(tmp_path: Path, tail: bytes, steps: int) -> None:
    first = writer(tmp_path, log_interval=1)
    for step in range(1, steps + 1):
        first.after_step(None, result(step))
        if step in (5, 7):
            first.validation(3.0, tokens=1, step=step, consumed_samples=BATCH * step)
    first.after_run(None, 75)
    (events_file,) = (tmp_path / "tensorboard").iterdir()
    with events_file.open("ab") as file:
        file.write(tail)
    resumed = writer(tmp_path, step=5, log_interval=1)
    for step in range(6, 9):
        resumed.after_step(None, result(step, loss=1.0))
    resumed.after_run(None, 0)
    # Sorted, because two files of one process and one second may be read in either order.
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [6.1, 6.2, 6.3, 6.4, 6.5, 1.0, 1.0, 1.0]
    points = sorted((point.step, round(point.value, 4)) for point in events.Scalars("lm loss"))
    assert points == list(enumerate(losses, start=1))
    points = sorted((point.step, round(point.value, 4)) for point in events.Scalars("lm loss vs samples"))
    assert points == [(BATCH * step, loss) for step, loss in enumerate(losses, start=1)]
    assert [point.step for point in events.Scalars("lm loss validation")] == [5]
    assert [point.step for point in events.Scalars("lm loss validation vs samples")] == [20]


def test_tensorboard_can_be_switched_off(tmp_path: Path) -> None:
    log = writer(tmp_path, tensorboard=False)
    log.after_step(None, result(2))
    log.after_run(None, 0)
    assert not (tmp_path / "tensorboard").exists()


def test_a_resume_repeats_no_step(tmp_path: Path) -> None:
    first = writer(tmp_path)
    for step in range(1, 8):
        first.after_step(None, result(step))
    first.validation(3.0, tokens=1, step=4, consumed_samples=16)
    first.validation(2.0, tokens=1, step=6, consumed_samples=24)
    # Killed: nothing is closed, and the last line is torn.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lm_lo')
    resumed = writer(tmp_path, step=5)
    for step in range(6, 11):
        resumed.after_step(None, result(step))
    resumed.after_run(None, 0)
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == list(range(1, 11))
    assert [record["step"] for record in read_records(tmp_path / "validation.jsonl")] == [4]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", ""),
        ('{"step": 1}\n{"step": 2}\n', '{"step": 1}\n{"step": 2}\n'),
        ('{"step": 1}\n{"step": 3}\n{"step": 4}\n', '{"step": 1}\n'),
        ('{"step": 3}\n', ""),
        ('{"step": 2}', ""),
        ('{"step": 1}\n\0\0\0\0', '{"step": 1}\n'),
    ],
)
def test_truncation(tmp_path: Path, text: str, kept: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(text)
    truncate_records(path, 2)
    assert path.read_text() == kept


def test_progress_tells_the_history_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    for step, code in ((0, 75), (4, 0)):
        log = writer(tmp_path, step=step)
        log.before_run(None)
        log.after_save(None, tmp_path / "checkpoints" / "iter_0000004")
        log.after_run(None, code)
    lines = [line.split("\t")[1:] for line in (tmp_path / "progress.txt").read_text().splitlines()]
    job = ["Job ID: 77", "# GPUs: 2"]
    assert lines == [
        [*job, "Starting job", "Iteration: 0"],
        [*job, "Saved checkpoint", "Iteration: 4"],
        [*job, "Ending job", "Exit code: 75"],
        [*job, "Starting job", "Iteration: 4"],
        [*job, "Saved checkpoint", "Iteration: 4"],
        [*job, "Ending job", "Exit code: 0"],
    ]


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_a_roll_back_cuts_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    log = writer(tmp_path, log_interval=1)
    for step in range(1, 6):
        log.after_step(None, result(step))
        log.dynamics({"step": step, "consumed_samples": step * BATCH, "grad_norm": {"layer_0": float(step)}})
    log.validation(5.0, tokens=10, step=5, consumed_samples=20)

    class RolledBack:
        step = 3

    log.rewind(RolledBack())
    for step in (4, 5):
        log.after_step(None, result(step, loss=1.0, skipped_samples=8))
    log.after_run(None, 0)
    records = read_records(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["skipped_samples"]) for record in records] == [
        (1, 0), (2, 0), (3, 0), (4, 8), (5, 8),
    ]  # fmt: skip
    assert [record["step"] for record in read_records(tmp_path / "dynamics.jsonl")] == [1, 2, 3]
    assert read_records(tmp_path / "validation.jsonl") == []
    assert [step for step, _ in scalars(tmp_path)["lm loss"]] == [1, 2, 3, 4, 5]
    assert "Rolled back\tIteration: 3" in (tmp_path / "progress.txt").read_text()
    assert "skipped samples:            8 |" in (tmp_path / "log.txt").read_text()


def test_dynamics_become_tags_by_layer_and_null_where_they_are_not_finite(tmp_path: Path) -> None:
    log = writer(tmp_path)
    log.dynamics({"step": 2, "consumed_samples": 8, "update_ratio": {"layer_0": 0.5, "layer_1": math.nan}})
    log.after_run(None, 0)
    assert read_records(tmp_path / "dynamics.jsonl")[0]["update_ratio"] == {"layer_0": 0.5, "layer_1": None}
    tags = scalars(tmp_path)
    assert tags["update-ratio/layer_0"] == [(2, 0.5)] and "update-ratio/layer_1" not in tags


def test_a_resumed_log_cuts_later_dynamics(tmp_path: Path) -> None:
    for start in (0, 1):
        log = writer(tmp_path, step=start)
        for step in range(start + 1, 4):
            log.dynamics({"step": step, "consumed_samples": step, "noise_scale": {"samples": 1.0}})
        log.after_run(None, 0)
    assert [record["step"] for record in read_records(tmp_path / "dynamics.jsonl")] == [1, 2, 3]


def test_validation_by_source_and_of_averaged_weights(tmp_path: Path) -> None:
    log = writer(tmp_path)
    log.validation(5.0, tokens=10, step=2, consumed_samples=8, by_source={"kjv": 4.0, "code": 6.0}, averaged=4.5)
    log.after_run(None, 0)
    record = read_records(tmp_path / "validation.jsonl")[0]
    assert record["lm_loss_by_source"] == {"kjv": 4.0, "code": 6.0} and record["lm_loss_ema"] == 4.5
    tags = scalars(tmp_path)
    assert tags["lm loss validation/kjv"][0] == (2, 4.0) and tags["lm loss validation ema"][0] == (2, 4.5)


def test_what_the_loss_logs_beside_is_recorded(tmp_path: Path) -> None:
    log = writer(tmp_path, log_interval=1)
    log.after_step(None, result(1, extra={"objective": 7.0, "z loss": math.inf}))
    log.after_run(None, 0)
    record = read_records(tmp_path / "metrics.jsonl")[0]
    assert (record["objective"], record["z_loss"], record["batch_size"]) == (7.0, None, BATCH)
    assert scalars(tmp_path)["objective"] == [(1, 7.0)]


def test_a_warning_is_said_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = writer(tmp_path)
    log.warn("iter_0000002 is damaged")
    log.after_run(None, 0)
    assert "warning: iter_0000002 is damaged" in capsys.readouterr().out
    assert "Warning\titer_0000002 is damaged" in (tmp_path / "progress.txt").read_text()


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt", "progress.txt"])
def test_a_full_disk_is_one_sentence(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to("/dev/full")
    with pytest.raises(LogError, match=r"run cannot be written any more \(No space left on device\)"):
        log = writer(run, log_interval=1)
        log.before_run(None)
        log.after_step(None, result(1))


def test_a_validation_made_again_has_one_record(tmp_path: Path) -> None:
    for _ in range(2):
        log = writer(tmp_path, step=4)
        log.validation(5.0, tokens=10, step=4, consumed_samples=16)
        log.after_run(None, 0)
    assert [record["step"] for record in read_records(tmp_path / "validation.jsonl")] == [4]
    assert [step for step, _ in scalars(tmp_path)["lm loss validation"]] == [4]


def test_an_error_is_kept_where_the_run_lies(tmp_path: Path) -> None:
    log = writer(tmp_path, log_interval=10)
    log.after_step(None, result(1))
    log.on_error(None, NonFiniteError("step 2: the loss is nan"))
    kept = (tmp_path / "log.txt").read_text()
    assert "iteration        1/" in kept and kept.endswith("error: step 2: the loss is nan\n")
    assert "Ending job\tExit code: 1" in (tmp_path / "progress.txt").read_text()
