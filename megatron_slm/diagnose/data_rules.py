"""Rules over the order of the data: does every step follow the one before, over all restarts, in every file?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from megatron_slm.data.cursor import Cursor
from megatron_slm.data.mixture import MIXTURE_VERSION
from megatron_slm.diagnose.finding import Finding
from megatron_slm.diagnose.records import FEWEST_STEPS, Records
from megatron_slm.diagnose.robust import median, share_above
from megatron_slm.errors import CheckpointError
from megatron_slm.train.saved_state import SavedState

SHOWN = 5
BEHIND_SHARE, BEHIND = 0.9, 0.02
"""Of the last quarter's steps, compared one by one, and of the loss. Were the runs alike, half would be above; 9 of
10 come in one of 93 runs, and 2 % of the loss is more than another seed brings."""

Anomaly = tuple[int, str]
"""A step, and a sentence."""


def data_order(records: Records) -> Finding | None:
    """Steps, samples and digests that do not follow from one another."""
    found = sorted([*_between_steps(records), *_in_checkpoints(records), *_against_the_same_run(records)])
    if not found:
        return None
    starts = [event.detail.rpartition(" ")[2] for event in records.events if event.what == "Starting job"]
    sentences = [sentence for _, sentence in found[:SHOWN]]
    if len(found) > SHOWN:
        sentences.append(f"and {len(found) - SHOWN} more")
    if starts:
        sentences.append(f"the run was started at step {', '.join(starts)}")
    return Finding(
        name="data-order",
        summary="what was read does not follow from what was read before",
        step=found[0][0],
        evidence=tuple(sentences),
        causes=(
            "a record or checkpoint was edited, or copied in from another run",
            "two jobs wrote one directory",
            "the corpus or the order of the mixture was changed under the run",
            "a loader that was changed reads on at another sample after a restart",
        ),
        intervention="Prove the resume with mslm replay resume-check CONFIG --at STEP and the corpus with mslm data "
        "verify CORPUS; go on from the newest checkpoint before that step.",
    )


def _between_steps(records: Records) -> Iterator[Anomaly]:
    """Every record against the one before it."""
    seen: dict[str, int] = {}
    for before, after in pairwise(records.steps):
        step = after["step"]
        if step != before["step"] + 1:
            yield step, f"step {before['step']} is followed by step {step} in metrics.jsonl"
        read, expected = _read(before, after), _batch(after)
        if read is not None and expected is not None and read != expected:
            kind = "are repeated" if read < expected else "are left out"
            yield (
                step,
                f"step {step} consumed {read} samples, its batch is of {expected}: {abs(read - expected)} {kind} "
                f"(consumed_samples {before['consumed_samples']} to {after['consumed_samples']})",
            )
    for record in records.steps:
        digest = record.get("sample_digest")
        if digest in seen and digest:
            yield record["step"], f"step {record['step']} has the sample digest of step {seen[digest]}"
        if digest:
            seen.setdefault(digest, record["step"])


def _read(before: Mapping[str, Any], after: Mapping[str, Any]) -> int | None:
    """Samples trained on between two records; what a roll-back passed over is known and does not count."""
    if after.get("consumed_samples") is None or before.get("consumed_samples") is None:
        return None
    passed = (after.get("skipped_samples") or 0) - (before.get("skipped_samples") or 0)
    return int(after["consumed_samples"] - before["consumed_samples"] - passed)


def _batch(record: Mapping[str, Any]) -> int | None:
    """Samples of a step's batch; records of older programs tell it by their tokens."""
    if (size := record.get("batch_size")) is not None:
        return int(size)
    consumed, tokens = record.get("consumed_samples"), record.get("tokens")
    if not consumed or not tokens or not record.get("consumed_tokens"):
        return None
    return round(tokens * consumed / record["consumed_tokens"])


def _in_checkpoints(records: Records) -> Iterator[Anomaly]:
    """Every checkpoint against itself and against the record of its step."""
    by_step = {record["step"]: record for record in records.steps}
    for step, state in records.checkpoints.items():
        if isinstance(state, str):
            yield step, f"checkpoint {step}: {state}"
            continue
        yield from ((step, f"checkpoint {step}: {sentence}") for sentence in _of_state(step, state))
        record = by_step.get(step)
        if record is None:
            continue
        for key, kept in (
            ("consumed_samples", state.consumed_samples),
            ("sample_digest", state.cursor.get("rolling_digest")),
        ):
            if record.get(key) is not None and kept is not None and record[key] != kept:
                yield step, f"step {step}: {key} is {record[key]} in metrics.jsonl, {kept} in the checkpoint"


def _of_state(step: int, state: SavedState) -> Iterator[str]:
    if state.step != step:
        yield f"it says that it is of step {state.step}"
    if state.cursor.get("consumed_samples") != state.consumed_samples:
        yield f"{state.consumed_samples} samples consumed, {state.cursor.get('consumed_samples')} by its cursor"
    if state.cursor.get("order_version") != MIXTURE_VERSION:
        return  # of another program, whose order this one cannot make again
    try:
        Cursor.from_dict(state.cursor)
    except CheckpointError as error:
        yield str(error)


def _against_the_same_run(records: Records) -> Iterator[Anomaly]:
    """Two runs of one model, data and seed read the same samples."""
    other = records.against
    if other is None or records.identity is None or records.identity != other.identity:
        return
    theirs = {record.get("consumed_samples"): record for record in other.steps}
    for record in records.steps:
        same = theirs.get(record.get("consumed_samples"))
        if same is None or (same.get("skipped_samples") or 0) != (record.get("skipped_samples") or 0):
            continue
        if same.get("sample_digest") != record.get("sample_digest"):
            yield (
                record["step"],
                f"step {record['step']} and step {same['step']} of {other.path} have read {record['consumed_samples']} "
                "samples of the same data and seed, and not the same ones",
            )
            return


def comparable(records: Records) -> str:
    """What the comparison with another run needs."""
    if records.against is None:
        return "needs --against RUN"
    if records.against.stage != records.stage or records.against.loss_key != records.loss_key:
        return f"--against is a run of another stage ({records.against.stage})"
    return "" if len(_pairs(records)) >= FEWEST_STEPS else f"needs {FEWEST_STEPS} steps that both runs have"


def behind(records: Records) -> Finding | None:
    """The loss stays above that of the other run."""
    pairs = _pairs(records)
    late = pairs[3 * len(pairs) // 4 :]
    assert records.against is not None, "the rule is asked only where there is another run"
    # In the order of the steps: the gap of each over the size of the other's loss.
    gaps = [(mine - other) / max(abs(other), 1e-12) for _, mine, other in late]
    if share_above(gaps, 0.0) < BEHIND_SHARE or median(gaps) < BEHIND:
        return None
    parted = next(step for step, mine, other in pairs if mine > other * (1.0 + BEHIND) or other < 0.0)
    mine, other = (median([pair[at] for pair in late]) for at in (1, 2))
    return Finding(
        name="behind",
        summary=f"{records.objective_name} stays above that of {records.against.path}",
        step=parted,
        evidence=(
            f"the last {len(late)} common steps: median {mine:.4f} here, {other:.4f} there; above it in "
            f"{share_above(gaps, 0.0):.0%} of them, by {median(gaps):.1%}",
            *_differing(records, records.against),
        ),
        causes=(
            "a setting that differs (see evidence)",
            "other data, or another order of it",
            "a changed program: mslm replay diff names the first tensor that differs",
        ),
        intervention="Make one differing setting equal and run as far as the step where they part.",
    )


def _pairs(records: Records) -> list[tuple[int, float, float]]:
    """(step, objective here, objective of the other run) of the steps that both have."""
    if records.against is None:
        return []
    mine, other = records.objective(), records.against.objective()
    theirs = dict(zip(other.steps, other.values, strict=True))
    return [(step, value, theirs[step]) for step, value in zip(*mine, strict=True) if step in theirs]


def _differing(first: Records, second: Records) -> Iterator[str]:
    """Settings of the two runs that are not the same, of the sections that change what is computed."""
    for section in ("model", "precision", "data", "train", "optimizer", "schedule", first.stage):
        mine, theirs = first.setting(section, {}), second.setting(section, {})
        if not isinstance(mine, Mapping) or not isinstance(theirs, Mapping):
            continue
        for key in sorted({*mine, *theirs}):
            if mine.get(key) != theirs.get(key):
                yield f"{section}.{key}: {mine.get(key)} here, {theirs.get(key)} there"
