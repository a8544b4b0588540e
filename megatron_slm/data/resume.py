"""Whether a run may go on from a saved cursor under the present configuration, and what changes from there on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from megatron_slm.config import mixture_text
from megatron_slm.config.mixture_text import REPLAY
from megatron_slm.data.config import DataConfig
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.mixture import MixtureOrder, Phase, Source
from megatron_slm.errors import CheckpointError

OF_RUN = {
    "tokenizer_hash": "the same ids mean other text; use the tokenizer the run was started with",
    "seq_length": "samples are cut elsewhere; set model.seq_length back",
}
OF_SOURCE = {
    "dataset_digest": "the corpus has other tokens; point data.data_path or data.sources at the corpus the run was "
    "started with (for replay: data.replay_run at the same checkpoint)",
    "seed": "set data.data_seed (or train.seed) back",
    "num_samples": "an epoch has another length; point at the corpus the run was started with",
}
"""What decides which samples come next, with the remedy for a change. Batch sizes, ranks and the target length are
absent: they do not enter the order. Names of sources are labels and may change."""


class Resumed(NamedTuple):
    """Where a run goes on: the saved position in the present configuration, and a sentence for every change."""

    cursor: Cursor
    changes: list[str]


def check_resume(saved: Cursor, current: Cursor, before: DataConfig | None = None) -> Resumed:
    """Refuse a resume whose next samples would not be those of the saved run, but for a change that was asked for.

    Shares may change from the saved position on, by phases that start there or later; sources may be added that way.
    Phases which the saved run decided itself are kept.

    Args:
        saved: the cursor of the checkpoint.
        current: a cursor of the present configuration and corpora; its position does not matter.
        before: the options that led to ``saved``, for the words of a refusal.

    Raises:
        CheckpointError: names everything that changed, with both values and the way to have it from here on.
    """
    changed = [*_changed_fields(saved, current), *_changed_sources(saved, current)]
    if changed:
        raise CheckpointError(
            f"The samples after {saved.consumed_samples} would not be those the saved run would have read next; "
            "samples already trained on would come again and others never:\n" + "\n".join(changed) + "\n"
            "To read other corpora from here on, keep these in data.sources, name the others beside them and add an "
            f"entry of data.phases such as '{saved.consumed_samples}: NAME=NUMBER ...'; to train these weights on "
            "other data alone, start a new run with checkpoint.pretrained_checkpoint."
        )
    earlier = [_renamed(phase, _names(saved.order, current.order)) for phase in saved.order.phases]
    after = [phase for phase in current.order.phases if not phase.adaptive]
    configured = [phase for phase in earlier if not phase.adaptive]
    first = f"data.weights={configured[0].weights_text.replace(' ', ',')}"
    if before is not None and before.sources and not before.weights and _same_sources(saved, current):
        first = f"data.temperature={before.temperature} (and no data.weights)"
    _refuse_changed_past(saved.consumed_samples, configured, after, first)
    adaptive = [phase for phase in earlier if phase.adaptive]
    order = MixtureOrder(
        current.order.sources, tuple(sorted([*after, *adaptive], key=lambda phase: (phase.start, phase.adaptive)))
    )
    cursor = dataclasses.replace(saved, order=order)
    return Resumed(cursor, list(_changes(saved.consumed_samples, earlier, order)))


def _changed_fields(saved: Cursor, current: Cursor) -> Iterator[str]:
    for name, remedy in OF_RUN.items():
        old, new = (getattr(where, name) for where in (saved, current))
        if old != new:
            yield f"  {name}: {old} in the checkpoint, {new} now: {remedy}"


def _changed_sources(saved: Cursor, current: Cursor) -> Iterator[str]:
    """Sources that the saved run has read, or was about to read, and that are not what they were."""
    by_digest = {source.order.digest: source for source in current.order.sources}
    by_name = {source.name: source for source in current.order.sources}
    only = len(saved.order.sources) == len(current.order.sources) == 1
    decided = {name for phase in saved.order.phases if phase.adaptive for name, _ in phase.parts}
    for source in saved.order.sources:
        consumed = saved.consumed_by_source[source.name]
        now = by_digest.get(source.order.digest) or (current.order.sources[0] if only else by_name.get(source.name))
        if now is not None:
            label = "" if only else f" of source {source.name}"
            for name, remedy in OF_SOURCE.items():
                old, new = _identity(source)[name], _identity(now)[name]
                if old != new:
                    yield f"  {name}{label}: {old} in the checkpoint, {new} now: {remedy}"
        elif consumed or source.name in decided:
            yield (
                f"  source {source.name}: {consumed} of its samples were read, and it is not among the sources now: "
                "keep it in data.sources, and end its part with an entry of data.phases in which it has no weight"
            )


def _same_sources(saved: Cursor, current: Cursor) -> bool:
    """Whether shares by size would be those of the saved run, but for the temperature."""
    old, new = ({source.order.digest for source in cursor.order.sources} for cursor in (saved, current))
    return old == new


def _identity(source: Source) -> dict[str, object]:
    order = source.order
    return {"dataset_digest": order.digest, "seed": order.seed, "num_samples": order.num_samples}


def _names(old: MixtureOrder, new: MixtureOrder) -> dict[str, str]:
    """Old name of a source -> its name now, found by what is inside; a source that is gone keeps its own."""
    by_digest = {source.order.digest: source.name for source in new.sources}
    return {source.name: by_digest.get(source.order.digest, source.name) for source in old.sources}


def _renamed(phase: Phase, names: Mapping[str, str]) -> Phase:
    return dataclasses.replace(phase, parts=tuple(sorted((names[name], part) for name, part in phase.parts)))


def check_lengths(consumed: int, before: Sequence[str], now: Sequence[str]) -> None:
    """Refuse another ``data.length_schedule`` for samples already read; that of samples to come is free.

    Raises:
        CheckpointError: it was changed; says how to change it for samples to come.
    """
    old, new = ([entry for entry in mixture_text.lengths(items) if entry[0] < consumed] for items in (before, now))
    if old == new:
        return
    told, found = ("; ".join(f"{start}: {tokens}" for start, tokens in entries) or "empty" for entries in (old, new))
    raise CheckpointError(
        f"data.length_schedule: for the {consumed} samples read so far it was {told} in the checkpoint, but is {found} "
        f"now; what was read cannot be changed. Keep those entries, and add others that begin at sample {consumed} or "
        "later."
    )


def _refuse_changed_past(consumed: int, before: list[Phase], after: list[Phase], first: str) -> None:
    """Shares of samples already read are a fact; ``first`` is what one types for those that the run began with.

    Raises:
        CheckpointError: they were changed; says how to change those of the samples to come.
    """
    old, new = ([phase for phase in phases if phase.start < consumed] for phases in (before, after))
    if old == new:
        return
    replayed = [{phase.shares.get(REPLAY, Fraction(0)) for phase in phases} for phases in (old, new)]
    if replayed[0] != replayed[1]:
        told, now = (" or ".join(f"{float(share):.4g}" for share in sorted(shares)) for shares in replayed)
        raise CheckpointError(
            f"data.replay_run and data.replay_share: the share of replayed samples was {told} in the checkpoint and is "
            f"{now} now, but it is the same all through a run. Set both back, or start a new run from these weights "
            "with checkpoint.pretrained_checkpoint."
        )
    differs = next((pair for pair in zip(old, new, strict=False) if pair[0] != pair[1]), None)
    where = "data.weights or data.temperature" if differs is not None and differs[0].start == 0 else "data.phases"
    told = "; ".join(f"{phase.shares_text} from sample {phase.start} on" for phase in old)
    now = "; ".join(f"{phase.shares_text} from sample {phase.start} on" for phase in new)
    wanted = [phase for phase in after if phase.start >= consumed]
    if not wanted or wanted[0].start > consumed:
        wanted.insert(0, dataclasses.replace(new[-1], start=consumed))
    raise CheckpointError(
        f"{where}: the {consumed} samples read so far were {told} in the checkpoint, but {now} now; what was read "
        f"cannot be changed. Go on as before with {_typed(first, before[1:])}, or change the mixture from here on with "
        f"{_typed(first, [*old[1:], *wanted])}."
    )


def _typed(first: str, phases: list[Phase]) -> str:
    """``first`` and the phases after it, to be pasted into a command line."""
    entries = ",".join(phase.entry for phase in phases)
    return f'{first} "data.phases={entries}"' if entries else first


def _changes(consumed: int, before: list[Phase], order: MixtureOrder) -> Iterator[str]:
    """A sentence for every change of the phases to come."""
    for place, phase in enumerate(order.phases):
        if phase not in before and phase.start >= consumed:
            old = order.phases[place - 1] if place else before[0]
            yield f"mixture changes at sample {phase.start}: {_difference(old, phase, order)}"
    kept = {phase.start for phase in order.phases}
    for phase in before:
        if phase.start not in kept:
            yield f"mixture does not change to {phase.shares_text} at sample {phase.start} any more"


def _difference(old: Phase, new: Phase, order: MixtureOrder) -> str:
    """``kjv 0.7 -> 0.5, code 0.3 -> 0.5``."""
    names = dict.fromkeys([*(source.name for source in order.sources), *old.share_texts])
    pairs = [(name, old.share_texts.get(name, "0"), new.share_texts.get(name, "0")) for name in names]
    return ", ".join(f"{name} {was} -> {now}" for name, was, now in pairs if was != now) or "the same shares"
