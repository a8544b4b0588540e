"""Recordings that are not whole: what is missing is said in one sentence, and nothing counts as compared by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_slm import cli
from megatron_slm.replay import stream
from megatron_slm.replay.capsule import Capsule, rank_path, run_path
from megatron_slm.replay.source import PACKAGE, sources_sha256
from megatron_slm.replay.stream import Flag, Phase, StreamWriter
from megatron_slm.train.run_directory import surroundings

STEPS = 6
NAMES = ("tokens int64[4]", "decoder.layers.0.mlp.linear_fc1.weight float32[4]", "grad_norm")
PHASES = (Phase.BATCH, Phase.PARAMETER, Phase.STEP)


def recorded(run: Path, *, steps: int = STEPS, unfinished: int | None = None, other: int | None = None) -> Path:
    """Two ranks; ``unfinished`` is the step in which the run died, ``other`` one whose parameters are other."""
    folder = run / "replay"
    for rank in range(2):
        writer = StreamWriter(folder, rank, step=0)
        entries = [(phase, 0, writer.number(name)) for phase, name in zip(PHASES, NAMES, strict=True)]
        for step in range(steps + 1):
            lanes = np.array([[step, rank + 9 * (index == 1 and step == other)] for index in range(3)], dtype=np.uint64)
            packed = stream.records_of(entries, lanes)
            if step == unfinished:
                writer.write(step, packed[:1], Flag.UNFINISHED)
                break
            writer.write(step, packed[1:2] if step == 0 else packed, Flag.START if step == 0 else 0)
        writer.close()
        rank_path(folder, rank, 0).write_text(json.dumps({"buckets": [], "environment": {}, "threads": {}}))
    start(folder, 0, {"dp": 2})
    return run


def start(folder: Path, step: int, layout: dict[str, int]) -> None:
    """The manifest of a start behind a step."""
    config = {"replay": {"level": "light"}}
    own = {"step": step, "groups": {"pp": [[0], [1]]}, "layout": layout, "world_size": 2, "config": config,
        "code": {"sources_sha256": sources_sha256(PACKAGE)}, "surroundings": surroundings()}  # fmt: skip
    run_path(folder, step).write_text(json.dumps(own))


def said(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """Exit code, output and message of ``mslm replay``; of a message one line."""
    code = cli.main(["replay", *map(str, words)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def test_steps_that_one_run_alone_has_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, short = recorded(tmp_path / "whole"), recorded(tmp_path / "short", steps=4)
    line = f"{whole / 'replay'} alone has steps 5 to 6, which nothing was compared with"
    for runs in ((whole, short), (short, whole)):
        code, out, _ = said(capsys, "diff", *runs)
        assert code == 0 and out.startswith("equal: ") and out.splitlines()[-1].strip() == line
    assert said(capsys, "bisect", whole, short)[:2] == (
        0,
        f"equal: every recorded step that both runs have, on every rank\n  {line}\n",
    )
    assert line in said(capsys, "diff", whole, short, "--json")[2]
    died = recorded(tmp_path / "died", unfinished=2)
    code, out, _ = said(capsys, "diff", whole, died)
    assert code == 0 and f"{whole / 'replay'} alone has steps 2 to 6, " in out
    code, out, _ = said(capsys, "diff", recorded(tmp_path / "other", other=3), short)
    assert code == 1 and f"{tmp_path / 'other' / 'replay'} alone has steps 5 to 6, " in out
    assert " alone has " not in said(capsys, "diff", whole, recorded(tmp_path / "again"))[1]


def test_a_rank_of_which_nothing_was_compared_is_no_equal_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, empty, died = (recorded(tmp_path / name) for name in ("whole", "empty", "died"))
    stream.stream_path(empty / "replay", 1).write_bytes(b"")
    path = stream.stream_path(died / "replay", 1)
    path.write_bytes(path.read_bytes()[: stream.frame_offsets(path)[0][1]])  # its start alone
    for run in (empty, died):
        code, out, err = said(capsys, "diff", whole, run)
        assert (code, out) == (2, "") and "Rank 1: no recorded step in common" in err and "steps 1 to 6" in err
        code, _, err = said(capsys, "step", run, "3")
        assert code == 2 and f"Step 3 is not in {run / 'replay'}: of rank 1 it has no whole step." in err


def test_a_missing_stream_is_not_another_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, lacks = recorded(tmp_path / "whole"), recorded(tmp_path / "lacks")
    gone = stream.stream_path(lacks / "replay", 1)
    gone.unlink()
    for words in (("diff", whole, lacks), ("diff", lacks, whole), ("step", lacks, "3"), ("sdc", lacks, "--every", "1")):
        code, _, err = said(capsys, *words)
        assert code == 2 and f"{gone} is missing: there is no stream of rank 1, which the run had." in err
    assert said(capsys, "show", lacks)[1].splitlines()[-1].split() == ["1", "missing"]


Spoil = Callable[[Path], Path]


def cut_names(folder: Path) -> Path:
    path = stream.names_path(folder, 0)
    path.write_bytes(path.read_bytes()[:30])
    return path


def garbled_names(folder: Path) -> Path:
    path = stream.names_path(folder, 0)
    path.write_bytes(b"\xff\xfe\n" + path.read_bytes())
    return path


def empty_rank_manifest(folder: Path) -> Path:
    path = rank_path(folder, 0, 0)
    path.write_text("{}")
    return path


def hollow_rank_manifest(folder: Path) -> Path:
    path = rank_path(folder, 0, 0)
    path.write_text(json.dumps({"threads": {}}))
    return path


def empty_run_manifest(folder: Path) -> Path:
    path = run_path(folder, 0)
    path.write_text("{}")
    return path


def manifest_that_is_a_list(folder: Path) -> Path:
    path = run_path(folder, 0)
    path.write_text("[]")
    return path


NAMES_ALONE, MANIFESTS = (("show", "--step", "3"), ("diff",), ("step", "3")), (("diff",), ("step", "3"))
SPOILED: dict[Spoil, tuple[tuple[str, ...], ...]] = {
    cut_names: NAMES_ALONE,
    garbled_names: NAMES_ALONE,
    empty_rank_manifest: MANIFESTS,
    hollow_rank_manifest: MANIFESTS,
    empty_run_manifest: (*MANIFESTS, ("show",)),
    manifest_that_is_a_list: (*MANIFESTS, ("show",)),
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_what_is_damaged_is_named(spoil: Spoil, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = recorded(tmp_path / "run"), recorded(tmp_path / "other", other=3)
    damaged = spoil(run / "replay")
    for verb, *options in SPOILED[spoil]:
        code, _, err = said(capsys, verb, run, *([other] if verb == "diff" else []), *options)
        assert code == 2 and f"{damaged} is damaged" in err and len(err.strip().splitlines()) == 1, (verb, err)


def test_a_path_that_is_not_there_is_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, gone = recorded(tmp_path / "run"), tmp_path / "gone"
    for words in (("show", gone), ("diff", run, gone), ("bisect", run, gone), ("layout-diff", run, gone)):
        code, _, err = said(capsys, *words)
        assert code == 2 and f"{gone}: there is no such directory" in err, err
    assert said(capsys, "show", tmp_path)[2].startswith(f"mslm: {tmp_path} holds no recording")


def test_every_start_is_shown_with_its_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recorded(tmp_path / "run")
    assert "from step" not in said(capsys, "show", run)[1]
    start(run / "replay", 4, {"dp": 1, "tp": 2})
    lines = said(capsys, "show", run)[1].splitlines()
    assert lines[0] == f"{run / 'replay'}: light, 2 ranks (dp 2)"
    assert lines[1] == "  from step 5 on: light, 2 ranks (dp 1 x tp 2)"
    assert Capsule.of(run).starts == [0, 4]
