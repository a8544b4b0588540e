"""What replays conclude from streams written by hand: an operation's module, and which making of a step is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.errors import ConfigError
from megatron_slm.replay import stream
from megatron_slm.replay.bisect import module_of
from megatron_slm.replay.capsule import Capsule, rank_path, run_path
from megatron_slm.replay.diff import Divergence, Key, first_divergence
from megatron_slm.replay.passes import fault_text, judged
from megatron_slm.replay.rerun import restored_difference
from megatron_slm.replay.sdc import PERSISTENT, TRANSIENT, UNDECIDED, UNEXPLAINED, Finding, hunt
from megatron_slm.replay.slots import Slot, began
from megatron_slm.replay.step import ReplayedStep
from megatron_slm.replay.stream import Flag, Phase, StreamWriter

RECORDS = (
    (Phase.OPERATION, "aten.mm.default[0]"),
    (Phase.OUTPUT, "decoder.layers.0.mlp"),
    (Phase.OPERATION, "aten.add.Tensor[0]"),
    (Phase.OUTPUT, "decoder.layers.0"),
    (Phase.OPERATION, "aten.log.default[0]"),
    (Phase.LOSS, "loss"),
    (Phase.OPERATION, "aten.exp.default[0]"),
    (Phase.OUTPUT_GRADIENT, "decoder.layers.0"),
    (Phase.OUTPUT_GRADIENT, "decoder.layers.0.mlp"),
    (Phase.OPERATION, "aten.mul.Tensor[0]"),
    (Phase.LOCAL_GRADIENT, "w"),
    (Phase.PARAMETER, "w"),
)
STEPS = 2


def recording(run: Path, struck: int | None = None, bits: int = 1, *, start: bool = False) -> Capsule:
    """One rank, two steps behind a start that holds the parameters; in the second the record ``struck`` is other.

    ``start``: whether the parameters of the start are other too.
    """
    folder = run / "replay"
    writer = StreamWriter(folder, 0, step=0)
    entries = [(phase, 0, writer.number(f"{name} float32[4]")) for phase, name in RECORDS]
    for step in (0, 1, 2):
        other = struck if step == STEPS else len(RECORDS) - 1 if step == 0 and start else None
        lanes = np.array([[index, bits if index == other else 0] for index in range(len(RECORDS))], dtype=np.uint64)
        packed = stream.records_of(entries, lanes)
        writer.write(step, packed[-1:] if step == 0 else packed, Flag.START if step == 0 else 0)
    writer.close()
    run_path(folder, 0).write_text(json.dumps({"groups": {"pp": [[0]]}, "layout": {"pp": 1}, "config": {}}))
    rank_path(folder, 0, 0).write_text(json.dumps({"buckets": []}))
    return Capsule.of(run)


@pytest.mark.parametrize(
    ("struck", "module"),
    [
        (0, "on the way to the output of decoder.layers.0.mlp"),
        (2, "on the way to the output of decoder.layers.0"),
        (4, "on the way to the output of loss"),
        (6, "behind the gradient of the output of loss"),
        (9, "behind the gradient of the output of decoder.layers.0.mlp"),
        (1, "decoder.layers.0.mlp"),
    ],
)
def test_an_operation_belongs_to_what_was_recorded_around_it(tmp_path: Path, struck: int, module: str) -> None:
    first = recording(tmp_path / "first")
    found = first_divergence(first, recording(tmp_path / "second", struck))
    assert found is not None and (found.step, found.index) == (STEPS, struck)
    assert module_of(first, found) == module


def made_by(run: Path, struck: Mapping[int, int], *, ranks: int, places: int = 0) -> Capsule:
    """Data-parallel ranks moved on by so many slots; a struck rank's own gradient is other, and what all sum up too.

    ``struck``: rank -> what its gradient is off by.
    """
    folder = run / "replay"
    for rank in range(ranks):
        writer = StreamWriter(folder, rank, step=0)
        records = (Phase.LOSS, "loss"), (Phase.LOCAL_GRADIENT, "w"), (Phase.GRADIENT, "w"), (Phase.PARAMETER, "w")
        entries = [(phase, 0, writer.number(f"{name} float32[4]")) for phase, name in records]
        total = hash(tuple(sorted(struck.items()))) % 1000 if struck else 0
        lanes = np.array([[0, 0], [rank, struck.get(rank, 0)], [0, total], [0, total]], dtype=np.uint64)
        writer.write(1, stream.records_of(entries, lanes), 0)
        writer.close()
        own = {"buckets": [], "host": "node", "slot": (rank + places) % ranks}
        rank_path(folder, rank, 0).write_text(json.dumps(own))
    groups = {"pp": [[rank] for rank in range(ranks)], "dp": [list(range(ranks))]}
    run_path(folder, 0).write_text(json.dumps({"groups": groups, "layout": {"dp": ranks}, "config": {}}))
    return Capsule.of(run)


def hunted(
    root: Path, strikes: Mapping[int, Callable[[int], Mapping[int, int]]], ranks: int, *, rotations: tuple[int, ...]
) -> tuple[list[tuple[int, int]], list[Finding]]:
    """What a hunt finds and which (attempt, places) it makes; ``strikes``: attempt (0 the run) -> places -> struck."""
    original = made_by(root / "run", strikes.get(0, lambda places: {})(0), ranks=ranks)
    made: list[tuple[int, int]] = []

    def replay(step: int, attempt: int, places: int) -> ReplayedStep:
        made.append((attempt, places))
        struck = strikes.get(attempt, strikes.get(ALWAYS, lambda places: {}))(places)
        again = made_by(root / f"again {attempt}", struck, ranks=ranks, places=places)
        return ReplayedStep(original, again, step, 0, first_divergence(original, again))

    return made, hunt(original, 1, replay, rotations=rotations)[1]


ALWAYS = -1


def faulty(slot: int, ranks: int) -> Callable[[int], Mapping[int, int]]:
    """Whoever runs on a slot is struck."""
    return lambda places: {(slot - places) % ranks: 1}


def once(rank: int) -> Callable[[int], Mapping[int, int]]:
    return lambda places: {rank: 1}


FIRST_TWO = [(1, 0), (2, 1)]


@pytest.mark.parametrize(
    ("strikes", "verdict", "said", "made"),
    [
        ({}, None, "", FIRST_TWO),
        ({0: once(2)}, TRANSIENT, "transient, in the recorded run: rank 2 on slot 2 of node", FIRST_TWO),
        ({1: once(2)}, TRANSIENT, "transient, in replay 1: rank 2 on slot 2 of node", FIRST_TWO),
        (
            {2: once(0)},
            TRANSIENT,
            "transient, in replay 2 with ranks moved by 1: rank 0 on slot 1 of node",
            [*FIRST_TWO, (3, 2)],  # or slot 0 was wrong before, and is not with another rank's work
        ),
        ({0: faulty(1, 4), ALWAYS: faulty(1, 4)}, PERSISTENT, "persistent, slot 1 of node: rank 1 in", FIRST_TWO),
        ({ALWAYS: faulty(3, 4)}, PERSISTENT, "persistent, slot 3 of node: ", FIRST_TWO),  # sound when recorded
        ({0: once(1), 1: once(1)}, PERSISTENT, "persistent, slot 1 of node: rank 1 in", [*FIRST_TWO, (3, 2)]),
        ({0: lambda _: {0: 1, 2: 1}}, UNEXPLAINED, "no single place", FIRST_TWO),
        ({0: once(1), 1: once(2)}, UNEXPLAINED, "no single place", FIRST_TWO),
    ],
)
def test_the_table_of_verdicts(
    tmp_path: Path, strikes: Any, verdict: str | None, said: str, made: list[tuple[int, int]]
) -> None:
    there, findings = hunted(tmp_path, strikes, 4, rotations=(1,))
    assert there == made
    assert [finding.verdict for finding in findings] == ([verdict] if verdict else [])
    assert not findings or said in str(findings[0]), str(findings[0])


def test_two_ranks_leave_the_slot_of_a_persistent_fault_open(tmp_path: Path) -> None:
    made, (found,) = hunted(tmp_path, {0: faulty(1, 2), ALWAYS: faulty(1, 2)}, 2, rotations=(1,))
    assert made == [(1, 0), (2, 1), (3, 1), (4, 0)], "there is no other rotation; the same again is no fault of once"
    assert found.verdict == UNDECIDED and {one.slot.number for one in found.found} == {0, 1}
    assert all(one.persistent for one in found.found) and "undecided: two ranks can be exchanged only" in str(found)
    assert "step 1, rank 0, rank 1, local gradient, w" in str(found)


def test_one_rank_cannot_be_moved(tmp_path: Path) -> None:
    made, (found,) = hunted(tmp_path, {0: once(0)}, 1, rotations=(1,))
    assert [places for _, places in made] == [0, 0, 0] and found.verdict == UNDECIDED
    assert "one rank cannot be moved" in str(found) and "transient, in the recorded run" in str(found)
    with pytest.raises(ConfigError, match="--rotate 3: one rank cannot be moved"):
        hunt(Capsule.of(tmp_path / "run"), 1, lambda *made: pytest.fail("none"), rotations=(3,))


@pytest.mark.parametrize("rotations", [(4,), (1, 5), (0,), (-1,)])
def test_ranks_are_moved_by_fewer_slots_than_there_are(tmp_path: Path, rotations: tuple[int, ...]) -> None:
    run = made_by(tmp_path, {}, ranks=4)
    with pytest.raises(ConfigError, match=f"--rotate {rotations[-1]}: 4 ranks can be moved by 1 to 3 slots"):
        hunt(run, 1, lambda *made: pytest.fail("none"), rotations=rotations)


def test_what_a_replica_has_in_common_began_at_its_first(tmp_path: Path) -> None:
    def differs(rank: int, phase: Phase, index: int, stage: int = 0) -> Divergence:
        return Divergence(1, False, rank, Key(phase, 0, "w", 0), index, stage, 2)

    two = [frozenset({0, 1}), frozenset({2, 3})]
    later = {0: differs(0, Phase.OUTPUT, 4), 1: differs(1, Phase.OUTPUT, 5, stage=1)}
    assert began(later, two) == (frozenset({0}),), "the second pipeline stage has received it"
    tie = {rank: differs(rank, Phase.OUTPUT, 4) for rank in (0, 1)}
    assert began(tie, two) == (frozenset({0, 1}),), "nothing tells which of two that have summed up"
    apart = {1: differs(1, Phase.LOCAL_GRADIENT, 9), 2: differs(2, Phase.OUTPUT, 1), 3: differs(3, Phase.GRADIENT, 1)}
    assert began(apart, two) == (frozenset({1}), frozenset({2})), "replicas meet in the reduction only"
    reduced = {0: differs(0, Phase.GRADIENT, 3), 2: differs(2, Phase.GRADIENT, 1), 3: differs(3, Phase.PARAMETER, 0)}
    assert began(reduced, two) == (frozenset({0, 2}),)


def test_two_of_three_passes_are_right() -> None:
    alone = [frozenset({rank}) for rank in range(3)]
    own = Divergence(7, False, 1, Key(Phase.LOCAL_GRADIENT, 0, "w float32[4]", 0), 3, 0, 1)
    summed = {rank: Divergence(7, False, rank, Key(Phase.GRADIENT, 0, "w", 0), 9, 0, 1) for rank in (0, 2)}

    def reports(equal: tuple[int, int] | None) -> list[dict[tuple[int, int], Divergence | None]]:
        pairs = ((0, 1), (0, 2), (1, 2))
        return [{pair: None if pair == equal else summed.get(rank, own) for pair in pairs} for rank in range(3)]

    for equal, struck in (((1, 2), 0), ((0, 2), 1), ((0, 1), 2), (None, None)):
        found = judged(reports(equal), alone)
        assert (found.struck, found.origins, found.divergence) == (struck, (frozenset({1}),), own), equal
    slots = [Slot("node", number) for number in (1, 2, 0)]
    said = fault_text(7, judged(reports((1, 2)), alone), slots)
    assert said.endswith(
        "the first of three passes differs from the other two: a transient fault at rank 1 on slot 2 "
        "of node, local gradient, w."
    )
    assert "gave three results, which part at rank 1 on" in fault_text(7, judged(reports(None), alone), slots)


def test_a_state_that_was_restored_to_something_else_is_its_own_difference(tmp_path: Path) -> None:
    # Both streams begin with a start; as the frame of a step it stands for what a checkpoint was taken of.
    left = recording(tmp_path / "left")
    path = stream.stream_path(left.folder, 0)
    content = bytearray(path.read_bytes())
    content[16:20] = bytes(4)  # the first frame's flags
    path.write_bytes(content)
    assert restored_difference(left, recording(tmp_path / "sound"), 0) is None
    found = restored_difference(left, recording(tmp_path / "damaged", start=True), 0)
    assert found is not None and found.start and (found.step, found.key.phase) == (0, Phase.PARAMETER)
