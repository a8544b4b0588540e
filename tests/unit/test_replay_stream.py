"""A rank's stream: what is written is read, torn ends are nothing, rewinding and thinning keep the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.errors import CheckpointError
from megatron_slm.replay import stream
from megatron_slm.replay.stream import Flag, Phase, Records, StreamWriter

NAMES = ("tokens", "weight float32[4,4]", "größe")


def records(writer: StreamWriter, step: int) -> Records:
    """Three records of two phases."""
    entries = [(Phase.BATCH, 0), (Phase.PARAMETER, 0), (Phase.PARAMETER, 3)]
    lanes = np.array([[step, 2**64 - 1], [2, step], [3, 4]], dtype=np.uint64)
    return stream.records_of([(*entry, writer.number(name)) for entry, name in zip(entries, NAMES, strict=True)], lanes)


def recorded(folder: Path, steps: int) -> Path:
    """A stream of so many steps, closed."""
    writer = StreamWriter(folder, 0, step=0)
    for step in range(1, steps + 1):
        writer.write(step, records(writer, step))
    writer.close()
    return stream.stream_path(folder, 0)


def steps_in(path: Path) -> list[int]:
    return [frame.step for frame in stream.read_frames(path)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = recorded(tmp_path, 3)
    frames = list(stream.read_frames(path))
    assert [(frame.step, frame.flags) for frame in frames] == [(1, Flag(0)), (2, Flag(0)), (3, Flag(0))]
    assert frames[1].records["lanes"].tolist() == [[2, 2**64 - 1], [2, 2], [3, 4]]
    assert frames[1].records["phase"].tolist() == [Phase.BATCH, Phase.PARAMETER, Phase.PARAMETER]
    assert frames[1].records["micro_batch"].tolist() == [0, 0, 3]
    assert stream.read_names(stream.names_path(tmp_path, 0)) == list(NAMES)
    assert stream.RECORD.itemsize == 24
    assert stream.ranks_in(tmp_path) == [0]


def test_every_torn_end_is_passed_over_and_cut_off(tmp_path: Path) -> None:
    path = recorded(tmp_path, 2)
    whole = path.read_bytes()
    half = len(whole) // 2
    for size in range(half + 1, len(whole)):
        path.write_bytes(whole[:size])
        assert steps_in(path) == [1]
    for torn in (path, stream.names_path(tmp_path, 0)):
        torn.write_bytes(torn.read_bytes()[:-1])
    writer = StreamWriter(tmp_path, 0, step=2)
    writer.write(3, records(writer, 3))
    writer.close()
    assert steps_in(path) == [1, 3]
    assert stream.read_names(stream.names_path(tmp_path, 0)) == list(NAMES)


def test_pages_that_never_reached_the_disk_are_a_torn_end(tmp_path: Path) -> None:
    path = recorded(tmp_path, 2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20] + bytes(20))
    assert steps_in(path) == [1]


def test_damage_before_the_end_is_said(tmp_path: Path) -> None:
    path = recorded(tmp_path, 3)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3 + 40] ^= 1
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=f"damaged {len(whole) // 3} bytes in"):
        steps_in(path)
    with pytest.raises(CheckpointError, match="--record"):
        steps_in(tmp_path / "rank_00007.stream")


def test_a_resume_goes_on_behind_its_step(tmp_path: Path) -> None:
    path = recorded(tmp_path, 5)
    writer = StreamWriter(tmp_path, 0, step=3)
    assert writer.whole_frames == 3
    writer.write(4, records(writer, 40))
    writer.rewind(1)
    writer.write(2, records(writer, 20))
    writer.close()
    frames = list(stream.read_frames(path))
    assert [frame.step for frame in frames] == [1, 2]
    assert frames[1].records["lanes"][0, 0] == 20


def test_an_unfinished_step_is_made_again(tmp_path: Path) -> None:
    path = recorded(tmp_path, 1)
    writer = StreamWriter(tmp_path, 0, step=1)
    writer.write(2, records(writer, 2), Flag.UNFINISHED)
    writer.close()
    assert steps_in(path) == [1, 2]
    StreamWriter(tmp_path, 0, step=2).close()
    assert steps_in(path) == [1]


def test_thinning_keeps_roots_that_still_compare(tmp_path: Path) -> None:
    path = recorded(tmp_path, 6)
    known = [stream.roots(frame, NAMES) for frame in stream.read_frames(path)]
    size = path.stat().st_size
    writer = StreamWriter(tmp_path, 0, step=6)
    writer.thin(2)
    assert writer.whole_frames == 2
    writer.write(7, records(writer, 7))
    writer.close()
    frames = list(stream.read_frames(path))
    assert [frame.step for frame in frames] == [1, 2, 3, 4, 5, 6, 7]
    assert [Flag.ROOTS in frame.flags for frame in frames] == [True] * 4 + [False] * 3
    assert [stream.roots(frame, NAMES) for frame in frames[:6]] == known
    assert len({tuple(roots) for roots in map(tuple, known)}) == 6, "the steps differ"
    assert path.stat().st_size < size + size // 6


def test_roots_do_not_depend_on_the_numbers_of_names(tmp_path: Path) -> None:
    (first, second) = (StreamWriter(tmp_path / name, 0, step=0) for name in "ab")
    second.number("another name first")
    for writer in (first, second):
        writer.write(1, records(writer, 1))
        writer.close()
    found = []
    for name in "ab":
        names = stream.read_names(stream.names_path(tmp_path / name, 0))
        found += [stream.roots(frame, names) for frame in stream.read_frames(stream.stream_path(tmp_path / name, 0))]
    assert found[0] == found[1]


def test_every_flushed_step_outlives_kill_9(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.unit.test_replay_stream import *\n"
        "writer = StreamWriter(Path(sys.argv[1]), 0, step=0)\n"
        "for step in range(1, 10**9):\n"
        "    writer.write(step, records(writer, step)); print(step, flush=True)\n"
    )
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    ) as writing:
        assert writing.stdout is not None, "it is a pipe"
        for line in writing.stdout:
            if int(line) >= 50:
                break
        time.sleep(0.01)
        writing.send_signal(signal.SIGKILL)
        printed = [int(line) for line in writing.stdout.read().splitlines() if line]
    steps = steps_in(stream.stream_path(tmp_path, 0))
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= max([50, *printed[:-1]])
    assert stream.read_names(stream.names_path(tmp_path, 0)) == list(NAMES)
