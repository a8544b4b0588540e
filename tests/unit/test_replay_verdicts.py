"""What replays conclude from streams written by hand: an operation's module, and which of three recordings is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.replay import stream
from megatron_slm.replay.bisect import module_of
from megatron_slm.replay.capsule import Capsule, rank_path, run_path
from megatron_slm.replay.diff import first_divergence
from megatron_slm.replay.rerun import restored_difference
from megatron_slm.replay.sdc import REPLAY_STRUCK, STRUCK, UNSTABLE, hunt
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


@pytest.mark.parametrize(
    ("replays", "verdict"),
    [((0, 0), None), ((5, 5), STRUCK), ((5, 0), REPLAY_STRUCK), ((5, 6), UNSTABLE)],
)
def test_two_of_three_are_right(tmp_path: Path, replays: tuple[int, int], verdict: str | None) -> None:
    original = recording(tmp_path / "run", 4, 0)
    made: list[int] = []

    def replay(step: int, attempt: int) -> ReplayedStep:
        made.append(attempt)
        again = recording(tmp_path / f"again {attempt}", 4, replays[attempt - 1])
        return ReplayedStep(original, again, step, 0, first_divergence(original, again))

    chosen, findings = hunt(original, 1, replay)
    assert chosen == [1, 2] and [finding.verdict for finding in findings] == ([verdict] if verdict else [])
    assert made == ([1, 2] if verdict else [1]), "both steps lie behind one start, and are made again together"


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
