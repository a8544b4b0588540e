"""What the answers of a model to the items of a task amount to: numbers of each item, of slices and of the whole.

All logarithms are natural. Numbers of an item are sums (``nats`` over ``tokens``), so that any group of items has its
mean; see :data:`COMPARED`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from megatron_slm.evaluate.compared import COMPARED
from megatron_slm.evaluate.items import Item, Task, right_choice
from megatron_slm.evaluate.scoring import Scored
from megatron_slm.evaluate.statistics import brier, pass_at_k, reliability

LENGTHS = (64, 256, 1024)
"""Borders of the buckets of length, in tokens that count."""
RARE_MASS = 0.1
"""The rarest tokens that make up so much of a task's text are its rare ones."""
RARE_RATES = (0.05, 0.1, 0.2)
"""Borders of the buckets of the share of rare tokens."""

Values = dict[str, float]


def measured(task: Task, values: Sequence[Values], rates: Sequence[float] = ()) -> dict[str, Any]:
    """A task's result: ``metrics`` of the whole, ``slices``, and ``items``.

    Args:
        values: of each item.
        rates: share of rare tokens of each item, of held-out text.
    """
    slices: dict[str, Callable[[int], str]] = {}
    if len({item.source for item in task.items}) > 1:
        slices["source"] = lambda number: task.items[number].source or "(none)"
    if task.kind == "held_out":
        slices["tokens"] = lambda number: bucket(values[number]["tokens"], LENGTHS)
        slices["rare tokens"] = lambda number: bucket(rates[number], RARE_RATES, "{:.0%}")
    grouped = {}
    for name, of in slices.items():
        groups: dict[str, list[Values]] = {}
        for number, value in enumerate(values):
            groups.setdefault(of(number), []).append(value)
        grouped[name] = {key: means(task.kind, groups[key]) for key in sorted(groups, key=_in_order)}
    return {
        "name": task.name,
        "kind": task.kind,
        "digest": task.digest,
        "metrics": means(task.kind, values),
        "slices": grouped,
        "items": [
            {"id": item.id, "source": item.source, "values": value}
            for item, value in zip(task.items, values, strict=True)
        ],
    }


def means(kind: str, values: Sequence[Values]) -> dict[str, float]:
    """The numbers of a group of items, by name."""
    found: dict[str, float] = {"items": len(values)}
    for one in COMPARED[kind]:
        total = math.fsum(value[one.sum] for value in values)
        over = math.fsum(value[one.over] for value in values) if one.over else len(values)
        found[one.name] = total / over if over else math.nan
    if kind == "held_out":
        found["tokens"] = math.fsum(value["tokens"] for value in values)
        found["perplexity"] = math.exp(found["loss"]) if found["loss"] < 700.0 else math.inf
        nats, size = math.fsum(value["nats"] for value in values), math.fsum(value["bytes"] for value in values)
        if size:
            found["bits per byte"] = nats / math.log(2.0) / size
    return found


def held_out(items: Sequence[Item], scored: Sequence[Sequence[Scored]]) -> tuple[list[Values], dict[str, Any]]:
    """Nats of each item, and how sure the model was of its first choice at every token."""
    values = [
        {
            "nats": -math.fsum(float(one.logprobs.sum()) for one in parts),
            "tokens": float(sum(len(one.logprobs) for one in parts)),
            "correct": math.fsum(float(one.correct.sum()) for one in parts),
            "bytes": float(sum(item.num_bytes)),
        }
        for item, parts in zip(items, scored, strict=True)
    ]
    confidence = np.concatenate([one.confidence for parts in scored for one in parts])
    correct = np.concatenate([one.correct for parts in scored for one in parts])
    return values, calibration(confidence, correct, float(np.square(confidence - correct).mean()))


def choices(items: Sequence[Item], scored: Sequence[Sequence[Scored]]) -> tuple[list[Values], dict[str, Any]]:
    """Which choice is the likeliest: as a whole, by token, by byte; and how sure the model was of it."""
    values, confidence, squares = [], [], []
    for item, parts in zip(items, scored, strict=True):
        right = right_choice(item.fields)
        raw = np.array([one.logprobs.sum() for one in parts])
        by = {
            "raw": raw,
            "token": raw / [max(1, len(one.logprobs)) for one in parts],
            "byte": raw / np.array(item.num_bytes),
        }
        shares = np.exp(raw - raw.max())
        shares /= shares.sum()
        squares.append(float(brier(shares[None], np.array([right]))[0]))
        confidence.append(float(shares.max()))
        found = {f"right_{name}": float(int(np.argmax(one)) == right) for name, one in by.items()}
        values.append({**found, "chosen": float(np.argmax(raw)), "share_of_right": float(shares[right])})
    return values, calibration(
        np.array(confidence), np.array([one["right_raw"] for one in values]), float(np.mean(squares))
    )


def golden(items: Sequence[Item], scored: Sequence[Sequence[Scored]]) -> list[Values]:
    """Whether each completion is as likely as is expected."""
    values = []
    for item, (one,) in zip(items, scored, strict=True):
        low, high = item.fields["expected"]
        found = float(one.logprobs.sum())
        values.append({"logprob": found, "low": low, "high": high, "in_range": float(low <= found <= high)})
    return values


def generated(scores: Sequence[Sequence[float]]) -> list[Values]:
    """Samples of each item that could be scored, how many passed (score 1 or more), and the sum of the scores."""
    return [
        {
            "samples": float(len(scored)),
            "passed": float(sum(one >= 1.0 for one in scored)),
            "score": math.fsum(scored),
            "unscored": float(len(own) - len(scored)),
        }
        for own in scores
        for scored in [[one for one in own if not math.isnan(one)]]
    ]


def passes(values: Sequence[Values], ks: Iterable[int]) -> dict[str, float]:
    """pass@k over the items that have so many scored samples, and the share of samples that have no score."""
    found = {}
    for k in ks:
        enough = [value for value in values if value["samples"] >= k]
        samples, passed = (np.array([value[name] for value in enough], np.int64) for name in ("samples", "passed"))
        found[f"pass@{k}"] = float(pass_at_k(samples, passed, k).mean()) if enough else math.nan
    asked = sum(value["samples"] + value["unscored"] for value in values)
    return {**found, "unscored": sum(value["unscored"] for value in values) / asked if asked else math.nan}


def calibration(confidence: np.ndarray, correct: np.ndarray, brier_score: float) -> dict[str, Any]:
    """``ece``, ``brier`` and the bins they come from."""
    bins = reliability(confidence, correct)
    return {
        "ece": bins.error,
        "brier": brier_score,
        "bins": {name: getattr(bins, name).tolist() for name in ("counts", "confidence", "accuracy")},
    }


def rare_rates(items: Sequence[Item]) -> list[float]:
    """Of each item the share of its tokens that are rare in all of them together, see :data:`RARE_MASS`."""
    labels = [np.concatenate([one.tokens[1:][one.weights[1:] != 0] for one in item.documents]) for item in items]
    counts = Counter(np.concatenate(labels).tolist())
    left, rare = RARE_MASS * counts.total(), set()
    # Tokens of one number stand together: which of them would be rare is not for their ids to say.
    for number in sorted(set(counts.values())):
        same = [token for token, count in counts.items() if count == number]
        if (left := left - number * len(same)) < 0:
            break
        rare.update(same)
    return [float(np.isin(own, list(rare)).mean()) if len(own) else 0.0 for own in labels]


def bucket(value: float, borders: Sequence[float], form: str = "{:g}") -> str:
    """The name of the bucket that a value falls into; each holds its upper border."""
    below = [border for border in borders if value > border]
    if not below:
        return f"<= {form.format(borders[0])}"
    if len(below) == len(borders):
        return f"> {form.format(borders[-1])}"
    return f"{form.format(below[-1])} - {form.format(borders[len(below)])}"


def _in_order(name: str) -> tuple[int, float, str]:
    """Buckets by size, other names by alphabet."""
    first = name.split(" ")[0]
    if first in ("<=", ">"):
        return (0 if first == "<=" else 2, 0.0, name)
    number = first.rstrip("%")
    return (1, float(number) if number.replace(".", "", 1).isdigit() else math.inf, name)
