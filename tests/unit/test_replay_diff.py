"""The first divergence of two recordings and its cause, on streams written by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_slm.errors import ConfigError
from megatron_slm.replay import capsule as capsules, stream
from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.cause import Cause, cause, circumstances
from megatron_slm.replay.config import ReplayConfig
from megatron_slm.replay.diff import WHOLE_PHASE, compare, first_divergence
from megatron_slm.replay.page import Page
from megatron_slm.replay.report import divergence_json, divergence_text
from megatron_slm.replay.stream import Flag, Phase, StreamWriter

STEPS = 4
RECORDS = (
    (Phase.BATCH, 0, "tokens int64[4]"),
    (Phase.RNG, 0, "torch uint8[8]"),
    (Phase.OUTPUT, 0, "decoder.layers.0.mlp float32[4]"),
    (Phase.OUTPUT, 1, "decoder.layers.0.mlp float32[4]"),
    (Phase.OUTPUT_GRADIENT, 0, "decoder.layers.0.mlp float32[4]"),
    (Phase.LOCAL_GRADIENT, 0, "decoder.layers.0.mlp.linear_fc1.weight float32[4]"),
    (Phase.GRADIENT, 0, "decoder.layers.0.mlp.linear_fc1.weight float32[4]"),
    (Phase.OPTIMIZER, 0, "decoder.layers.0.mlp.linear_fc1.weight.exp_avg float32[4]"),
    (Phase.PARAMETER, 0, "decoder.layers.0.mlp.linear_fc1.weight float32[4]"),
    (Phase.STEP, 0, "grad_norm"),
)
RUN = {
    "step": 0,
    "groups": {"pp": [[0, 1]], "tp": [[0], [1]]},
    "layout": {"tp": 1, "pp": 2},
    "config": {"name": "x", "optimizer": {"lr": 1.0}, "parallel": {"ddp_bucket_size": 7}, "train": {"seed": 1}},
    "data": {"tokenizer_hash": "t", "sources": {"corpus": {"digest": "d", "directory": "/here"}}},
    "code": {"sources_sha256": "c"},
}
RANK = {
    "step": 0,
    "host": "here",
    "threads": {"intra_op": 1},
    "environment": {"NCCL_ALGO": "Ring"},
    "libraries": {},
    "buckets": [[["a"]]],
}
Edit = Callable[[dict[str, Any]], None]
Struck = Sequence[tuple[int, int, int]]
"""(rank, step, record) of what is other in a recording."""


def recording(
    folder: Path, struck: Struck = (), *, run: Edit | None = None, rank: Edit | None = None, records: Any = RECORDS
) -> Capsule:
    """Two pipeline stages; lanes tell records, ranks and steps apart, and struck records."""
    replay = folder / "replay"
    for number in range(2):
        writer = StreamWriter(replay, number, step=0)
        for step in range(STEPS):
            lanes = [
                [len(name) * phase + micro_batch, 100 * number + step + 1000 * ((number, step, index) in struck)]
                for index, (phase, micro_batch, name) in enumerate(records)
            ]
            entries = [(phase, micro_batch, writer.number(name)) for phase, micro_batch, name in records]
            kept = slice(7, 9) if step == 0 else slice(None)  # what is there before the first step
            packed = stream.records_of(entries, np.array(lanes, dtype=np.uint64))[kept]
            writer.write(step, packed, Flag.START if step == 0 else 0)
        writer.close()
        capsules.rank_path(replay, number, 0).write_text(json.dumps(edited(RANK, rank)))
    capsules.run_path(replay, 0).write_text(json.dumps(edited(RUN, run)))
    return Capsule.of(folder)


def edited(manifest: dict[str, Any], edit: Edit | None) -> dict[str, Any]:
    changed = copy.deepcopy(manifest)
    if edit is not None:
        edit(changed)
    return changed


def test_equal_recordings_do_not_part(tmp_path: Path) -> None:
    assert first_divergence(recording(tmp_path / "a"), recording(tmp_path / "b")) is None


FIRST = {
    "the earlier step": ([(0, 3, 0), (1, 2, 8)], (1, 2, Phase.PARAMETER)),
    "the earlier phase": ([(0, 2, 6), (1, 2, 5)], (1, 2, Phase.LOCAL_GRADIENT)),
    "the earlier micro-batch": ([(0, 2, 3), (1, 2, 2)], (1, 2, Phase.OUTPUT)),
    "forward, the earlier stage": ([(0, 2, 2), (1, 2, 2)], (0, 2, Phase.OUTPUT)),
    "backward, the later stage": ([(0, 2, 4), (1, 2, 4)], (1, 2, Phase.OUTPUT_GRADIENT)),
    "forward before backward": ([(1, 2, 4), (0, 2, 2)], (0, 2, Phase.OUTPUT)),
    "the start before any step": ([(1, 0, 8), (0, 1, 0)], (1, 0, Phase.PARAMETER)),
}


@pytest.mark.parametrize("name", FIRST)
def test_what_came_first_is_named(name: str, tmp_path: Path) -> None:
    struck, (rank, step, phase) = FIRST[name]
    found = first_divergence(recording(tmp_path / "a"), recording(tmp_path / "b", struck))
    assert found is not None and (found.rank, found.step, found.key.phase) == (rank, step, phase)
    assert found.start == (step == 0) and found.inputs_equal is (None if step == 0 else True)
    said = divergence_text(found, Cause("", "", ()))
    assert ("inputs    none: nothing came before it" if step == 0 else "inputs    equal: on this rank") in said


def config_edit(key: str, section: str = "parallel") -> Edit:
    return lambda manifest: manifest["config"][section].__setitem__(key, 99)


ORDER, KERNEL = "communication order", "kernel or thread count"
CAUSES: dict[str, tuple[int, Edit | None, Edit | None, str, str | None]] = {
    "tokens, another corpus": (0, lambda m: m["data"]["sources"]["corpus"].update(digest="e"), None, "data", "digest"),
    "tokens, another tokenizer": (0, lambda m: m["data"].update(tokenizer_hash="u"), None, "data", "tokenizer_hash"),
    "tokens, another batch size": (0, config_edit("global_batch_size", "train"), None, "configuration", "batch_size"),
    "tokens, nothing else": (0, None, None, "data", None),
    "another random state": (1, None, None, "random numbers", None),
    "an output, other threads": (2, None, lambda m: m["threads"].update(intra_op=4), KERNEL, "threads"),
    "an output, other threads by the variable": (
        2,
        None,
        lambda m: (m["threads"].update(intra_op=4), m["environment"].update(OMP_NUM_THREADS="4")),
        KERNEL,
        "threads",
    ),
    "an output, the variable alone": (
        2,
        None,
        lambda m: m["environment"].update(OMP_NUM_THREADS="1"),
        "silent corruption",
        None,
    ),
    "an output, another variable": (2, None, lambda m: m["environment"].update(OMP_X="1"), "environment", "OMP_X"),
    "an output, other code": (2, lambda m: m["code"].update(sources_sha256="d"), None, "code", "sources"),
    "an output, nothing else": (2, None, None, "silent corruption", None),
    "a path and a name are no cause": (
        5,
        lambda m: (m["config"].update(name="y"), m["data"]["sources"]["corpus"].update(directory="/there")),
        lambda m: m.update(host="there"),
        "silent corruption",
        None,
    ),
    "reduced, other buckets": (6, config_edit("ddp_bucket_size"), None, ORDER, "bucket_size"),
    "reduced, another algorithm": (6, None, lambda m: m["environment"].update(NCCL_ALGO="Tree"), ORDER, "NCCL"),
    "reduced, nothing else": (6, None, None, "silent corruption", None),
    "a moment, other decay": (7, config_edit("weight_decay", "optimizer"), None, "configuration", "weight_decay"),
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_is_judged_by_phase_and_circumstances(name: str, tmp_path: Path) -> None:
    index, run, rank, kind, fact = CAUSES[name]
    first, second = recording(tmp_path / "a"), recording(tmp_path / "b", [(1, 2, index)], run=run, rank=rank)
    found = first_divergence(first, second)
    assert found is not None and found.rank == 1
    judged = cause(first, second, found)
    assert judged.kind == kind
    assert fact is None or any(fact in one.key for one in judged.evidence)
    assert judged.kind in divergence_text(found, judged) and json.loads(divergence_json(found, judged))["cause"] == kind


def test_a_tensor_that_one_run_alone_has(tmp_path: Path) -> None:
    first, second = recording(tmp_path / "a"), recording(tmp_path / "b", records=(*RECORDS[:5], *RECORDS[6:]))
    found = first_divergence(first, second)
    assert found is None, "the other run was recorded without that phase"
    added = (*RECORDS[:6], (Phase.LOCAL_GRADIENT, 0, "added float32[1]"), *RECORDS[6:])
    found = first_divergence(first, recording(tmp_path / "c", records=added))
    assert found is not None and (found.only_in, found.key.name) == ("second", "added float32[1]")


def test_roots_are_compared_with_whole_steps(tmp_path: Path) -> None:
    first = recording(tmp_path / "a")
    for name, struck in (("b", []), ("c", [(1, 2, 6)])):
        recording(tmp_path / name, struck)
        for rank in range(2):
            writer = StreamWriter(tmp_path / name / "replay", rank, step=STEPS)
            writer.thin(1)
            writer.close()
    assert first_divergence(first, Capsule.of(tmp_path / "b")) is None
    found = first_divergence(first, Capsule.of(tmp_path / "c"))
    assert found is not None and (found.step, found.key.phase, found.key.name) == (2, Phase.GRADIENT, WHOLE_PHASE)


def long_recording(folder: Path, steps: int, struck: Callable[[int, int], bool], first_name: str = "a") -> Capsule:
    """``struck(step, record)`` of a rank's gradient, parameter and moment in each step."""
    replay = folder / "replay"
    writer = StreamWriter(replay, 0, step=0)
    phases = (Phase.GRADIENT, Phase.OPTIMIZER, Phase.PARAMETER)
    numbers = {name: writer.number(name) for name in (first_name, "a", "b")}
    for step in range(1, steps + 1):
        lanes = np.array([[step, index + 100 * struck(step, index)] for index in range(3)], dtype=np.uint64)
        writer.write(step, stream.records_of([(phase, 0, numbers["a"]) for phase in phases], lanes))
    writer.close()
    capsules.rank_path(replay, 0, 0).write_text(json.dumps(RANK))
    capsules.run_path(replay, 0).write_text(json.dumps({**RUN, "groups": {"pp": [[0]]}}))
    return Capsule.of(folder)


LONG = {
    "a difference that stays": (lambda step, index: step > 700 or (step == 700 and index == 0), 700, 12),
    "one that was absorbed before another": (lambda step, index: step > 700 or (step == 300 and index == 0), 300, 12),
    "a state that came back": (lambda step, index: step in (300, 301, 302) or step > 990, 300, 12),
    "one that is gone in the end": (lambda step, index: step == 300, 300, 301),
    "none": (lambda step, index: False, None, 1000),
}


@pytest.mark.parametrize("name", LONG)
def test_few_steps_of_a_long_recording_are_compared(name: str, tmp_path: Path) -> None:
    struck, step, most = LONG[name]
    first = long_recording(tmp_path / "a", 1000, lambda step, index: False)
    found = compare(first, long_recording(tmp_path / "b", 1000, struck))
    assert (found.divergence and found.divergence.step) == step and found.frames == 1000
    assert found.read <= most, "ceil(log2(1000)) halvings, the last frame, and the one that differs"
    if found.divergence is not None and step is not None:
        assert found.divergence.previous == step - 1 and found.divergence.inputs_equal


def test_streams_that_number_names_otherwise_are_read_up_to_the_difference(tmp_path: Path) -> None:
    first = long_recording(tmp_path / "a", 100, lambda step, index: False)
    second = long_recording(tmp_path / "b", 100, lambda step, index: step == 20 or step > 60, first_name="c")
    found = compare(first, second)
    assert found.divergence is not None and found.divergence.step == 20
    assert found.read <= 20 + 8, "up to it, and ceil(log2(100)) halvings with the last frame"
    assert str(found) == f"{found.read} of 100 recorded steps of all ranks"


def test_other_layouts_are_refused(tmp_path: Path) -> None:
    def other(manifest: dict[str, Any]) -> None:
        manifest.update(groups={"pp": [[0], [1]]}, layout={"tp": 2, "pp": 1})

    with pytest.raises(ConfigError, match="pp 2 and tp 2"):
        first_divergence(recording(tmp_path / "a"), recording(tmp_path / "b", run=other))


def test_other_corpora_are_named_by_their_paths_first(tmp_path: Path) -> None:
    def at(path: str, digest: str) -> Edit:
        def edit(manifest: dict[str, Any]) -> None:
            manifest["config"]["data"] = {"data_path": path, "sources": {}}
            manifest["data"]["sources"]["corpus"]["digest"] = digest

        return edit

    first = recording(tmp_path / "a", run=at("/here", "d"))
    for name, path, digest, expected in (("b", "/there", "e", ["config.data.data_path", "data.sources.corpus.digest"]),
                                         ("c", "/here", "e", ["data.sources.corpus.digest"]),
                                         ("d", "/there", "d", [])):  # fmt: skip
        second = recording(tmp_path / name, [(1, 2, 0)], run=at(path, digest))
        found = first_divergence(first, second)
        assert found is not None
        judged = cause(first, second, found)
        assert judged.kind == "data" and [one.key for one in judged.evidence] == expected


def test_circumstances_are_those_of_the_start_before_the_step(tmp_path: Path) -> None:
    first, second = recording(tmp_path / "a"), recording(tmp_path / "b")
    resumed = edited(RANK, lambda manifest: manifest["threads"].update(intra_op=2))
    capsules.rank_path(second.folder, 1, 2).write_text(json.dumps(resumed))
    assert circumstances(first, second, 2) == []
    assert [(one.key, one.rank) for one in circumstances(first, second, 3)] == [("threads.intra_op", 1)]


def test_a_page_reads_what_is_noted_soon_before_anything_else(tmp_path: Path) -> None:
    page, writer = Page(), StreamWriter(tmp_path, 0, step=0)
    kept, changed = torch.arange(4.0), torch.arange(4.0)
    page.note_soon(Phase.OUTPUT, 0, ["kept", "twice", "changed"], [kept, kept, changed])
    changed.add_(1.0)
    page.note(Phase.PARAMETER, 0, ["later"], [torch.arange(4.0)])
    page.note_value(Phase.STEP, "loss", (1, 2))
    page.write(writer, 1, 0)
    writer.close()
    names = stream.read_names(stream.names_path(tmp_path, 0))
    assert names == [*(f"{name} float32[4]" for name in ("kept", "twice", "changed (overwritten)", "later")), "loss"]
    lanes = next(stream.read_frames(stream.stream_path(tmp_path, 0))).records["lanes"].tolist()
    assert lanes[0] == lanes[1] == lanes[3] != lanes[2] and lanes[4] == [1, 2]


def test_nothing_is_recorded_by_default() -> None:
    assert not ReplayConfig().records and ReplayConfig(level="light").records
