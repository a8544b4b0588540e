"""Rules over what a run minimises: divergence, spikes, late instability, plateaus."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_slm.diagnose.finding import Finding
from megatron_slm.diagnose.records import FEWEST_STEPS, POLICY_STAGES, Records, Series
from megatron_slm.diagnose.robust import change, deviation, median, rolling_medians, share_above

ABOVE_START = 0.1
"""Of the first loss, which may have been a lucky batch: with a noise of 10 % a step, a flat loss has 90 % of its last
steps this far above the first in 1 of 100 runs, and then it is a plateau anyway."""
MOST = 0.9
"""Of 10 steps or more. Were above and below equally likely, 9 of 10 would come in 1 of 93 runs, 23 of 25 in 1 of
100,000."""
LOST_HALF = 0.5
"""Of what had been learned: beyond it a rollback is cheaper than waiting."""
WINDOW_DEVIATIONS = 3.0
"""A median of ten steps has an error of 0.4 deviations, so this is over five errors of a difference of two: more than
the luck of the best of some hundred windows."""
RISE = 0.05
"""Of the best loss: a smaller upturn is within what the order of the data does."""
SPIKE_DEVIATIONS = 10.0
"""The guard warns at 6 while a run lasts, and a batch of rare text may reach 8 with no harm done; what does harm has
jumped by tens of deviations."""
SPIKE_RISE = 0.1
"""Of the median: where the noise is tiny, deviations alone would call anything a spike."""
SPIKE_TAIL = 3.0
"""Times the 95th percentile of how far any step is above those before it. Normal noise has it at 1.6 deviations, so
this changes nothing; losses whose noise has a long tail have many such steps, and none of them is an event."""
SPIKE_WINDOW, SPIKE_MEMORY = 16, 32
"""Steps before that a spike is judged by, at least and at most: enough for a deviation, and little trend in them."""
VOLATILE = 4.0
"""Times the noise in the second quarter of the run. The ratio of two such estimates from 25 steps each is within 2.5
in all but 1 of 1,000 runs."""
NO_PROGRESS_ERRORS = 2.0
"""Less than two standard errors of progress over a whole run: none that could be told from noise."""
SPENT_RATE = 0.01
"""Of the peak learning rate: what it can still move is too little to see."""
SPENT_SHARE = 1.0 / 3.0
"""Of all steps: the tail of a cosine schedule below 1 % of its peak is 6 % of it."""
EMPTY_LOSS = 0.01
"""Nats a token. No text is that predictable to a model of it: English has about 0.6 nats a character."""


def enough_steps(records: Records) -> str:
    """What a divergence is told by: steps enough for a trend, or a loss that is not finite."""
    return "" if _trouble(records) else enough_for_quarters(records)


def enough_for_quarters(records: Records) -> str:
    """What is told by comparing parts of a run."""
    found = len(records.objective().values)
    return "" if found >= FEWEST_STEPS else f"needs {FEWEST_STEPS} steps with {records.objective_name}, has {found}"


def enough_for_halves(records: Records) -> str:
    """What is told by a turn: steps before it and after it."""
    found = len(records.objective().values)
    if found >= 2 * FEWEST_STEPS:
        return ""
    return f"needs {2 * FEWEST_STEPS} steps with {records.objective_name}, has {found}"


def spikes_visible(records: Records) -> str:
    """What a spike is told by: steps before it, or what the guard did."""
    if len(records.series(records.loss_key).values) > SPIKE_WINDOW or any(r.get("skipped") for r in records.steps):
        return ""
    return f"needs more than {SPIKE_WINDOW} steps with a loss"


def not_finite(record: Mapping[str, Any], records: Records) -> bool:
    """Whether a step's loss was NaN or infinite, which a record says with null."""
    key = records.loss_key
    return key in record and record[key] is None


def width_of(series: Series) -> int:
    """Steps of a smoothing window: a tenth of the run, at least 5 and at most 50."""
    return max(5, min(50, len(series.values) // 10))


def divergence(records: Records) -> Finding | None:
    """The loss is not finite, ends above where it began, or has lost half of what it had gained."""
    evidence: list[str] = []
    first = None
    for step, sentence in _trouble(records):
        first = first if first is not None else step
        evidence.append(sentence)
    series = records.objective()
    if len(series.values) >= FEWEST_STEPS and (risen := _risen(series, records.objective_name)):
        first = first if first is not None else risen[0]
        evidence.append(risen[1])
    if first is None:
        return None
    rates = records.series("learning_rate").values
    if rates:
        evidence.append(f"learning rate {max(rates):.3g} at its peak, optimizer.clip_grad {_clip(records):g}")
    return Finding(
        name="divergence",
        summary=f"{records.objective_name} has left what was learned and does not come back",
        step=first,
        evidence=tuple(evidence),
        causes=_divergence_causes(records),
        intervention="Go back to the newest checkpoint before that step and halve optimizer.lr; with a warm-up of 0, "
        "also set schedule.lr_warmup_iters to 1 to 2 % of the run.",
    )


def _trouble(records: Records) -> list[tuple[int, str]]:
    """Losses that are not finite, in the records or in what ended the run."""
    found = []
    bad = [record["step"] for record in records.steps if not_finite(record, records) and not record.get("skipped")]
    if bad:
        found.append((bad[0], f"the loss of {len(bad)} steps is not finite, the first at step {bad[0]}"))
    for error in records.errors[-1:]:
        if any(word in error for word in ("the loss is nan", "the loss is inf", "not finite")):
            found.append((records.steps[-1]["step"] + 1, f"the run ended with: {error[:300]}"))
    return found


def _divergence_causes(records: Records) -> tuple[str, ...]:
    warm = int(records.setting("schedule.lr_warmup_iters", 0))
    causes = [
        "the learning rate is too high for this model and batch",
        "there is no warm-up" if not warm else f"the warm-up of {warm} steps is too short",
        "gradients are not clipped" if not _clip(records) else "clipping hides gradients that grow",
        "a bad shard or batch",
        "overflow in a low-precision format, or broken hardware",
    ]
    if not _clip(records):
        causes.insert(1, causes.pop(2))
    return tuple(causes)


def _clip(records: Records) -> float:
    return float(records.setting("optimizer.clip_grad", 1.0))


def _risen(series: Series, name: str) -> tuple[int, str] | None:
    """Where a loss has left what was learned, and the sentence about it."""
    width = width_of(series)
    late = series.values[-max(10, width) :]
    # The first step alone: with a rate far too high the second is already lost.
    began = series.values[0]
    limit = began + ABOVE_START * abs(began)
    if share_above(late, limit) >= MOST:
        smooth = rolling_medians(series.values, min(width, len(late)))
        below = [at for at, value in enumerate(smooth) if value <= limit]
        step = series.steps[below[-1] + 1 if below else 1]
        return step, (
            f"{name} began at {began:.4g} and is above that in {share_above(late, limit):.0%} of the last "
            f"{len(late)} steps (median {median(late):.4g})"
        )
    smooth = rolling_medians(series.values, width)
    best = min(range(len(smooth)), key=smooth.__getitem__)
    start, end = smooth[0], smooth[-1]
    lost, learned = end - smooth[best], start - smooth[best]
    noise = deviation(series.values)
    if learned <= 0.0 or lost <= LOST_HALF * learned or lost <= WINDOW_DEVIATIONS * noise:
        return None
    return series.steps[best + width - 1], (
        f"{name} fell from {start:.4g} to {smooth[best]:.4g} (median of {width} steps up to step "
        f"{series.steps[best + width - 1]}) and rose to {end:.4g}: {lost / learned:.0%} of the gain is lost, "
        f"{lost / noise if noise else math.inf:.0f} times the noise of a step"
    )


def spike(records: Records) -> Finding | None:
    """Single steps far above those before them, and what the guard skipped or rolled back."""
    evidence, steps = [], []
    series = records.series(records.loss_key)
    lost = _risen(series, "") if len(series.values) >= FEWEST_STEPS else None
    for step, value, middle, far in _spikes(series):
        if lost is not None and step >= lost[0]:
            continue  # what does not come back is no spike
        steps.append(step)
        evidence.append(
            f"step {step}: loss {value:.4g}, {far:.0f} robust deviations above {middle:.4g}, the median of up to "
            f"{SPIKE_MEMORY} steps before"
        )
    skipped = [record["step"] for record in records.steps if record.get("skipped")]
    if skipped:
        steps += skipped
        evidence.append(f"the guard skipped {len(skipped)} steps, the first {skipped[0]}")
    if rolled := [event for event in records.events if event.what == "Rolled back"]:
        back = int(rolled[0].detail.rpartition(" ")[2])
        steps.append(back)
        evidence.append(f"the guard rolled the run back {len(rolled)} times, first to step {back}")
    if not steps:
        return None
    shown = evidence[:5] + ([f"and {len(evidence) - 5} more"] if len(evidence) > 5 else [])
    samples = {record["step"]: record for record in records.steps}.get(min(steps), {})
    batch = int(samples.get("batch_size") or 0)
    if batch and (end := samples.get("consumed_samples")) is not None:
        shown.append(f"step {min(steps)} read the samples at positions {end - batch} to {end - 1}")
    return Finding(
        name="spike",
        summary="the loss jumped and came back",
        step=min(steps),
        evidence=tuple(shown),
        causes=(
            "a batch unlike the rest: wrong encoding, repeated tokens, a broken document",
            "a learning rate near what the model still bears, or one that was raised",
            "Adam's second moment remembers too long: optimizer.adam_beta2 near 1",
            "a gradient that was not clipped",
        ),
        intervention="Look at the samples with mslm data inspect. If they are bad, take them out; if they are not and "
        "it comes again, set train.spike_policy=skip or lower optimizer.lr.",
    )


def _spikes(series: Series) -> list[tuple[int, float, float, float]]:
    """(step, value, median before, deviations above it) of steps far above those before, that those after are not."""
    values = series.values
    befores = [values[max(0, at - SPIKE_MEMORY) : at] for at in range(SPIKE_WINDOW, len(values))]
    middles = [median(before) for before in befores]
    rises = [value - middle for value, middle in zip(values[SPIKE_WINDOW:], middles, strict=True)]
    tail = SPIKE_TAIL * sorted(rises)[int(0.95 * len(rises))] if rises else 0.0
    found = []
    for at, (before, middle, rise) in enumerate(zip(befores, middles, rises, strict=True), start=SPIKE_WINDOW):
        noise = deviation(before)
        after = values[at + 1 : at + 1 + SPIKE_WINDOW]
        back = not after or median(after) < middle + rise / 2.0
        if back and rise > max(SPIKE_DEVIATIONS * noise, SPIKE_RISE * abs(middle), tail):
            found.append((series.steps[at], values[at], middle, rise / noise if noise else math.inf))
    return found


def late_instability(records: Records) -> Finding | None:
    """The loss turns up, or becomes restless, in the second half of a run that was learning."""
    series = records.objective()
    width = width_of(series)
    smooth, noise = rolling_medians(series.values, width), deviation(series.values)
    best = min(range(len(smooth)), key=smooth.__getitem__)
    lost = smooth[-1] - smooth[best]
    held = records.held_out(records.loss_key).values
    # What is held out is the same each time: as long as it falls, harder training batches explain a rise.
    still_falling = len(held) >= 3 and held[-1] == min(held)
    evidence, step = [], series.steps[min(best + width, len(series.steps) - 1)]
    if not still_falling and lost > max(WINDOW_DEVIATIONS * noise, RISE * abs(smooth[best])):
        evidence.append(
            f"{records.objective_name} was best at {smooth[best]:.4g} around step {step} and ends at {smooth[-1]:.4g}, "
            f"{lost / noise if noise else math.inf:.1f} times the noise of a step higher"
        )
    second, last = series.quarter(1), series.quarter(3)
    calm = max(deviation(second), 1e-3 * abs(median(second)))
    # Rewards and preference losses begin without noise, because all answers do: there it has to grow.
    measurable = records.stage in ("pretrain", "sft", "distill") and len(last) >= FEWEST_STEPS
    restless = measurable and deviation(last) > VOLATILE * calm
    if restless and not still_falling:
        step = series.steps[3 * len(series.steps) // 4] if not evidence else step
        evidence.append(
            f"from one step to the next the loss moves by {deviation(last):.3g} in the last quarter, by {calm:.3g} in "
            "the second"
        )
    if not evidence or _risen(series, "") is not None:  # then it is a divergence
        return None
    norms = records.series("grad_norm")
    if len(norms.values) >= FEWEST_STEPS:
        by_quarter = ", ".join(f"{median(norms.quarter(at)):.3g}" for at in range(4))
        evidence.append(f"gradient norm, median by quarter of the run: {by_quarter}")
    return Finding(
        name="late-instability",
        summary="a run that was learning has become unstable",
        step=step,
        evidence=tuple(evidence),
        causes=(
            "the learning rate is still high where it should have decayed",
            "attention or output logits have grown: no z-loss, no normalised queries and keys",
            "optimizer.adam_beta2 too near 1 for gradients that now change quickly",
            "later data is unlike the earlier (a phase of the mixture, a curriculum)",
        ),
        intervention="Resume from the newest checkpoint before that step with a decaying schedule or half the "
        "learning rate; if it comes again, add train.z_loss_coefficient=1e-4.",
    )


def plateau(records: Records) -> Finding | None:
    """Nothing is learned: no progress over the run, no learning rate left, or nothing left to predict."""
    series = records.objective()
    moved = change(series.quarter(0), series.quarter(3))
    rates = records.series("learning_rate")
    peak = max(rates.values, default=0.0)
    evidence, step = [], series.steps[0]
    if len(series.values) >= 2 * FEWEST_STEPS and abs(moved.errors) < NO_PROGRESS_ERRORS and not _falls(series):
        evidence.append(
            f"{records.objective_name} has a median of {moved.early:.4g} in the first quarter and {moved.late:.4g} in "
            f"the last: {abs(moved.errors):.1f} standard errors apart"
        )
    spent = [rate <= SPENT_RATE * peak for rate in rates.values]
    if spent and sum(spent) > SPENT_SHARE * len(spent) and len(spent) >= FEWEST_STEPS:
        evidence.append(f"the learning rate is below {SPENT_RATE:.0%} of its peak {peak:.3g} in {sum(spent)} steps")
        step = next(step for step, out in zip(rates.steps, spent, strict=True) if out)
    if records.stage == "pretrain" and median(series.quarter(3)) < EMPTY_LOSS:
        evidence.append(f"the loss is {median(series.quarter(3)):.2g} nats a token: there is nothing left to predict")
        step = next(step for step, value in zip(series.steps, series.values, strict=True) if value < EMPTY_LOSS)
    if not evidence:
        return None
    return Finding(
        name="plateau",
        summary="nothing more is learned",
        step=step,
        evidence=tuple(evidence),
        causes=_plateau_causes(records, peak),
        intervention="Try mslm train CONFIG --lr-range-test for the rate, and mslm data inspect for what is trained "
        "on; change one of them and look at 100 steps.",
    )


def _falls(series: Series) -> bool:
    """A run that learned everything in its first quarter has stood still since, and is in order."""
    width = width_of(series)
    began, end = series.values[:3], series.values[-width:]
    return median(end) < min(began) - max(2.0 * deviation(series.values), RISE * abs(min(began)))


def _plateau_causes(records: Records, peak: float) -> tuple[str, ...]:
    causes = [
        "the learning rate is too low, or its decay ends too early",
        "the data holds nothing to learn: one token, one document, labels that are all masked",
        "weights are frozen, or the initialisation is saturated (see dead-gradients)",
    ]
    if records.stage in POLICY_STAGES:
        causes.insert(0, "the reward does not tell answers apart (see zero-variance-groups)")
    if peak == 0.0:
        causes.insert(0, "the learning rate is 0: optimizer.lr, or a schedule that never leaves its warm-up")
    return tuple(causes)
