"""The loss plot shows what the run has recorded, and says what is missing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_slm.config.load import load
from megatron_slm.data.tokenizer import train_tokenizer
from megatron_slm.train import publish

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tools" / "plot_loss.py"
SEQ_LENGTH = 256


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot_loss", PROGRAM)
    assert spec is not None and spec.loader is not None, f"{PROGRAM} is a Python file"
    module = importlib.util.module_from_spec(spec)
    sys.modules["plot_loss"] = module
    spec.loader.exec_module(module)
    return module


def records(path: Path, losses: dict[int, float | None]) -> None:
    lines = [{"step": step, "consumed_samples": 8 * step, "lm_loss": loss} for step, loss in losses.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 200 steps with two validations."""
    directory = tmp_path / "first"
    directory.mkdir()
    config = load(None, ["name=first", f"model.seq_length={SEQ_LENGTH}", "preset=tiny"])
    (directory / "config.yaml").write_text(config.to_yaml())
    records(directory / "metrics.jsonl", {step: 2.0 + 4.0 / step for step in range(1, 201)})
    records(directory / "validation.jsonl", {0: 6.5, 200: 2.125})
    return directory


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, env=environment, check=False
    )


def test_the_command_writes_a_picture(run: Path) -> None:
    output = run.parent / "pictures" / "loss.png"
    done = command(str(run), "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {output}\n"
    assert output.read_bytes().startswith(b"\x89PNG")


def test_what_is_missing_is_said(run: Path, tmp_path: Path) -> None:
    nothing = command(str(tmp_path / "absent"))
    assert nothing.returncode == 2 and "absent holds no run (config.yaml is missing)" in nothing.stderr
    records(run / "metrics.jsonl", {1: None})
    no_step = command(str(run))
    assert no_step.returncode == 2 and "no step with a finite loss" in no_step.stderr
    assert "Traceback" not in nothing.stderr + no_step.stderr


def test_the_curves_are_the_records(run: Path, program: ModuleType) -> None:
    training = program.read_curve(run / "metrics.jsonl", SEQ_LENGTH)
    held_out = program.read_curve(run / "validation.jsonl", SEQ_LENGTH)
    axes = program.draw(training, held_out, "first").axes[0]
    raw, mean, dots = axes.lines
    assert np.array_equal(raw.get_xdata(), 8.0 * SEQ_LENGTH * np.arange(1, 201))
    assert np.array_equal(raw.get_ydata(), 2.0 + 4.0 / np.arange(1, 201))
    assert np.array_equal(dots.get_xdata(), [0.0, 8.0 * SEQ_LENGTH * 200])
    assert np.array_equal(dots.get_ydata(), [6.5, 2.125])
    assert mean.get_label() == "training, mean of 5 steps"
    assert axes.texts[0].get_text() == "2.125, perplexity 8.37"
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("tokens", "loss (nats per token)", "first")


def test_a_run_without_validations_or_with_one_step_is_drawn(run: Path, program: ModuleType) -> None:
    (run / "validation.jsonl").unlink()
    records(run / "metrics.jsonl", {1: 6.0})
    program.plot(run, run / "loss.svg")
    assert "<svg" in (run / "loss.svg").read_text()


def test_steps_without_a_loss_and_half_a_line_are_left_out(run: Path, program: ModuleType) -> None:
    records(run / "metrics.jsonl", {1: 3.0, 2: None, 3: 1.0})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "consumed_sam')
    curve = program.read_curve(run / "metrics.jsonl", SEQ_LENGTH)
    assert curve.losses.tolist() == [3.0, 1.0]
    assert curve.tokens.tolist() == [8.0 * SEQ_LENGTH, 24.0 * SEQ_LENGTH]


def test_the_mean_is_centred_and_unbiased_on_a_line(program: ModuleType) -> None:
    line = 5.0 - 0.25 * np.arange(12)
    assert np.allclose(program.centred_mean(line, 5), line, atol=1e-12), "a straight line is its own centred mean"
    assert program.centred_mean(np.array([3.0, 0.0, 0.0, 6.0]), 3).tolist() == [3.0, 1.0, 2.0, 6.0]


def test_the_title_counts_parameters_where_the_vocabulary_is_known(run: Path, program: ModuleType) -> None:
    config = load(run / "config.yaml").config
    assert program.run_title(run, config) == "first", "neither the configuration nor a checkpoint knows the vocabulary"
    checkpoints = run / "checkpoints"
    temporary = publish.begin(checkpoints, 200)
    (temporary / "tokenizer").mkdir()
    train_tokenizer(["in the beginning " * 50], 280, temporary / "tokenizer" / "tokenizer.model")
    publish.publish(temporary, publish.checkpoint_path(checkpoints, 200))
    from_checkpoint = program.run_title(run, config)
    assert from_checkpoint.startswith("first: ") and from_checkpoint.endswith("M parameters")
    known = load(run / "config.yaml", ["model.vocab_size=4096"]).config
    assert program.run_title(run, known) == "first: 4M parameters"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1500, "1.5K"), (2e6, "2M"), (7.25e9, "7.25B"), (1.5e13, "15T")]
)
def test_counts_are_short(program: ModuleType, value: float, text: str) -> None:
    assert program.short_count(value) == text
