"""Draw a run's training and held-out loss against tokens: ``python tools/plot_loss.py runs/kjv --output loss.png``.

The faint line is every step, the strong one a centred mean of them, the dots are the held-out samples.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_slm.config.load import load
from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import DataError, UserError
from megatron_slm.model.counts import parameters
from megatron_slm.train import publish

SMOOTHING_SHARE = 50
"""The mean is taken over a 50th of the run: wide enough to show a trend, narrow enough to keep its bends."""


@dataclass(frozen=True)
class Curve:
    """Losses in nats a token after so many tokens; steps without a finite loss are left out."""

    tokens: np.ndarray
    losses: np.ndarray


def read_curve(path: Path, seq_length: int) -> Curve:
    """The losses of a ``metrics.jsonl`` or ``validation.jsonl``; none where there is no such file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    # A run that is still being written may end in half a line.
    records: list[dict[str, Any]] = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    points = [
        (record["consumed_samples"] * seq_length, record["lm_loss"])
        for record in records
        if record["lm_loss"] is not None
    ]
    tokens, losses = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return Curve(tokens, losses)


def centred_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over ``window`` (odd) neighbours; over fewer at the ends, so the line neither lags nor bends there.

    Args:
        values: [N].

    Returns:
        [N].
    """
    assert window % 2 == 1, f"a centred window has an odd number of steps, not {window}"
    half, count = window // 2, len(values)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    # The reach shrinks on both sides at once: a one-sided mean would be biased where the loss falls fastest.
    reach = np.minimum(half, np.minimum(np.arange(count), count - 1 - np.arange(count)))
    stops, starts = np.arange(count) + reach + 1, np.arange(count) - reach
    return (sums[stops] - sums[starts]) / (stops - starts)


def draw(training: Curve, held_out: Curve, title: str) -> Figure:
    """The picture."""
    figure = Figure(figsize=(9.0, 5.2), layout="constrained")
    axes = figure.add_subplot()
    window = max(1, len(training.losses) // SMOOTHING_SHARE) | 1
    axes.plot(training.tokens, training.losses, color="#1f77b4", alpha=0.3, linewidth=0.8, label="training, each step")
    if window > 1:
        mean = centred_mean(training.losses, window)
        axes.plot(training.tokens, mean, color="#1f77b4", linewidth=1.8, label=f"training, mean of {window} steps")
    if len(held_out.losses):
        # Dots without a line: between two of them nothing was measured.
        axes.plot(held_out.tokens, held_out.losses, "o", color="#d62728", markersize=5.5, label="held-out")
        _name_last(axes, held_out)
    axes.set_title(title)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, position: short_count(value)))
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(alpha=0.25)
    axes.spines["top"].set_visible(False)
    axes.spines["right"].set_visible(False)
    axes.margins(x=0.01)
    axes.legend(frameon=False)
    return figure


def short_count(value: float) -> str:
    """1500000 -> 1.5M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def run_title(run: Path, config: RunConfig) -> str:
    """Name of the run and, where its vocabulary is known, the size of its model."""
    vocab_size = config.model.vocab_size
    checkpoint = publish.latest(run / "checkpoints")
    if vocab_size is None and checkpoint is not None:
        vocab_size = Tokenizer.open(checkpoint / "tokenizer").vocab_size
    if vocab_size is None:
        return str(config.name)
    return f"{config.name}: {short_count(parameters(config.model, vocab_size))} parameters"


def plot(run: Path, output: Path) -> None:
    """Write the picture of ``run`` to ``output``; its ending decides the format (png, svg, pdf).

    Raises:
        UserError: ``run`` is not a run's directory, or it has taken no step.
    """
    if not (run / "config.yaml").exists():
        raise DataError(f"{run} holds no run (config.yaml is missing); name a directory such as runs/NAME")
    config = load(run / "config.yaml").config
    training = read_curve(run / "metrics.jsonl", config.model.seq_length)
    if not len(training.losses):
        raise DataError(f"{run / 'metrics.jsonl'} holds no step with a finite loss yet; wait for the first step")
    held_out = read_curve(run / "validation.jsonl", config.model.seq_length)
    output.parent.mkdir(parents=True, exist_ok=True)
    draw(training, held_out, run_title(run, config)).savefig(output, dpi=150)


def _name_last(axes: Axes, held_out: Curve) -> None:
    """Write the last held-out loss and its perplexity beside its dot."""
    loss = float(held_out.losses[-1])
    perplexity = f", perplexity {math.exp(loss):.3g}" if loss < 50.0 else ""
    axes.annotate(
        f"{loss:.3f}{perplexity}",
        (float(held_out.tokens[-1]), loss),
        xytext=(0, 9),
        textcoords="offset points",
        ha="right",
        color="#d62728",
    )


def main() -> int:
    """Read the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="a run's directory, runs/NAME")
    parser.add_argument("--output", type=Path, help="picture to write; default RUN/loss.png")
    arguments = parser.parse_args()
    output = arguments.output or arguments.run / "loss.png"
    try:
        plot(arguments.run, output)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
