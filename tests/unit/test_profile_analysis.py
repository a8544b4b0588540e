"""Where the time of a step went, on traces made by hand, whose overlaps are known."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.commands import profile
from megatron_slm.errors import DataError
from megatron_slm.profile import names
from megatron_slm.profile.analyse import RankReport, Spent, analysed
from megatron_slm.profile.chrome import read_chrome
from megatron_slm.profile.compare import report_of, slowest, traces_of
from megatron_slm.profile.exchanges import Asked, matched
from megatron_slm.profile.intervals import common, total, union, without
from megatron_slm.profile.names import Exchanged
from megatron_slm.profile.report import text_of
from megatron_slm.profile.trace import Exchange, Places, Range, segments

TRAINING, GLOO = 1, 2
"""Threads."""


def test_sets_of_intervals() -> None:
    one = union([(5, 9), (0, 3), (2, 4), (9, 9), (20, 30)])
    assert one == [(0, 4), (5, 9), (20, 30)]
    assert without(one, [(1, 2), (3, 6), (25, 40)]) == [(0, 1), (2, 3), (6, 9), (20, 25)]
    assert common(one, [(1, 2), (3, 6), (25, 40)]) == [(1, 2), (3, 4), (5, 6), (25, 30)]
    assert total(without(one, [])) == 18
    assert without([(0, 10), (12, 20)], [(0, 30)]) == []


def test_the_innermost_range_names_a_moment() -> None:
    ranges = [
        Range(0, 100, names.STEP, "7"),
        Range(10, 80, names.PHASE, "forward and backward"),
        Range(20, 60, names.MICRO_BATCH, "0 forward"),
        Range(30, 50, names.MODULE, "decoder.layers.0.mlp forward"),
        Range(35, 40, names.COLLECTIVE, "all_reduce tp 8 bytes"),
        Range(90, 130, names.PHASE, "optimizer"),
    ]
    divided = segments(ranges)
    assert [(start, end) for start, end, _ in divided] == [
        (0, 10), (10, 20), (20, 30), (30, 50), (50, 60), (60, 80), (80, 90), (90, 100)
    ]  # fmt: skip
    places = Places(divided)
    assert places.at(37) == ("7", "forward and backward", "0 forward", "decoder.layers.0.mlp forward")
    assert places.at(70) == ("7", "forward and backward", "", "") and places.at(95).phase == "optimizer"
    assert places.at(110) == ("", "", "", ""), "what outlives its step is cut"


def test_labels_are_read_as_they_were_written() -> None:
    exchanged = Exchanged("all_reduce", "tp", 4096)
    label = names.label_of(names.collective(exchanged).text)
    assert label is not None and label.kind == names.COLLECTIVE and names.exchanged_of(label.name) == exchanged
    assert names.label_of("Optimizer.step#Adam.step") is None and names.label_of("gloo:all_reduce") is None
    assert names.without_numbers("decoder.layers.13.mlp backward") == "decoder.layers.*.mlp backward"


def event(
    category: str, name: str, start: float, end: float, thread: int = TRAINING, **arguments: Any
) -> dict[str, Any]:
    """An event of a Chrome trace; microseconds."""
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": 1,
        "tid": thread,
        "ts": start,
        "dur": end - start,
        "args": arguments,
    }


def written(path: Path, events: list[dict[str, Any]], rank: int = 0, **about: Any) -> Path:
    """A trace as torch's profiler lays it out."""
    document = {"traceEvents": events, "mslm": {"rank": rank, "host": "here", **about}}
    path.write_bytes(gzip.compress(json.dumps(document).encode()))
    return path


def cpu_step(slow: float = 0.0) -> list[dict[str, Any]]:
    """A step of 1000 us and ``slow``: 300 + ``slow`` of a forward pass of which 200 compute, and two exchanges.

    The all_reduce on tp runs from 400 to 600, of which an operator hides 450 to 500; the send on pp from 700 to 800.
    """
    shape = {"Input Dims": [[4, 8]], "Input type": ["float"]}
    behind = [
        event("user_annotation", "phase: gradient norm", 400, 900),
        event("user_annotation", "collective: all_reduce tp 128 bytes", 395, 405),
        event("cpu_op", "c10d::allreduce_", 396, 404),
        event("user_annotation", "gloo:all_reduce", 400, 600, GLOO, **shape),
        event("cpu_op", "aten::copy_", 410, 590, GLOO),
        event("cpu_op", "aten::mul", 450, 500),
        event("user_annotation", "collective: send pp 128 bytes", 700, 705),
        event("user_annotation", "gloo:send", 700, 800, TRAINING, **shape),
        event("user_annotation", "phase: optimizer", 900, 1000),
        event("cpu_op", "aten::add_", 900, 1000),
    ]
    for one in behind:
        one["ts"] += slow
    return [
        event("user_annotation", "step: 10", 0, 1000 + slow),
        event("user_annotation", "phase: data", 0, 100),
        event("user_annotation", "phase: forward and backward", 100, 400 + slow),
        event("user_annotation", "micro-batch: 0 forward", 100, 400 + slow),
        event("user_annotation", "module: decoder.layers.0.mlp forward", 150, 400 + slow),
        event("cpu_op", "aten::linear", 150, 350),
        event("cpu_op", "aten::addmm", 200, 300),
        event("cpu_op", "autograd::engine::evaluate_function: MmBackward0", 100, 390),
        *behind,
    ]


def analysed_step(tmp_path: Path, slow: float = 0.0, rank: int = 0) -> RankReport:
    path = written(tmp_path / f"rank-{rank}.json.gz", cpu_step(slow), rank)
    return analysed(read_chrome(path))


def test_a_cpu_step_is_compute_exposed_communication_and_host(tmp_path: Path) -> None:
    found = analysed_step(tmp_path)
    assert found.steps_ns == {"10": 1_000_000} and not found.on_gpu
    # linear 200, mul 50, add_ 100; what gloo's thread copies and autograd's wrapper are no compute
    assert found.spent == Spent(1_000_000, 350_000, 250_000)
    assert found.phases == {
        names.DATA: Spent(100_000, 0, 0),
        names.FORWARD_BACKWARD: Spent(300_000, 200_000, 0),
        names.JUDGED: Spent(500_000, 50_000, 250_000),
        names.OPTIMIZER: Spent(100_000, 100_000, 0),
    }
    assert found.modules["decoder.layers.0.mlp forward"] == Spent(250_000, 200_000, 0)
    assert found.modules["(micro-batch forward, outside of modules)"] == Spent(50_000, 0, 0)


def test_exposed_communication_by_axis(tmp_path: Path) -> None:
    rows = {(one.axis, one.operation): one for one in analysed_step(tmp_path).axes}
    tp, pp = rows["tp", ""], rows["pp", "send"]
    assert (tp.calls, tp.size_bytes, tp.time_ns, tp.exposed_ns) == (1, 128, 200_000, 150_000)
    assert (pp.calls, pp.size_bytes, pp.time_ns, pp.exposed_ns) == (1, 128, 100_000, 100_000)
    assert list(rows)[0] == ("tp", ""), "the axis that costs most comes first"


def test_operators_are_counted_without_those_they_call(tmp_path: Path) -> None:
    own = {one.name: (one.calls, one.own_ns) for one in analysed_step(tmp_path).kernels}
    assert own["aten::linear"] == (1, 100_000) and own["aten::addmm"] == (1, 100_000)


def test_gaps_say_what_came_before_and_after(tmp_path: Path) -> None:
    gaps = analysed_step(tmp_path).gaps
    assert (gaps[0].start_ns, gaps[0].length_ns, gaps[0].before, gaps[0].behind) == (0, 150_000, "", "aten::linear")
    assert (gaps[1].before, gaps[1].behind, gaps[1].phase) == ("all_reduce tp", "send pp", names.JUDGED)
    assert sum(gap.length_ns for gap in gaps) == 1_000_000 - 350_000 - 250_000


def test_the_slow_rank_is_named_with_its_module(tmp_path: Path) -> None:
    found = slowest([analysed_step(tmp_path, slow, rank) for rank, slow in enumerate((0, 0, 400, 50))])
    assert found is not None
    assert (found.rank, found.own_ns, found.others_ns) == (2, 1_150_000, 750_000)
    assert (found.where, found.more_ns) == ("decoder.layers.*.mlp forward", 400_000)
    assert slowest([analysed_step(tmp_path)]) is None


def test_a_gpu_kernel_belongs_to_where_it_was_launched(tmp_path: Path) -> None:
    """Kernels run behind the host: what is launched in the forward pass and runs in the next phase is the forward's."""
    launch = {"category": "cuda_runtime", "name": "cudaLaunchKernel"}
    events = [
        event("user_annotation", "step: 3", 0, 1000),
        event("user_annotation", "phase: forward and backward", 0, 300),
        event("user_annotation", "module: output_layer forward", 100, 200),
        event("user_annotation", "phase: optimizer", 300, 1000),
        event("user_annotation", "collective: reduce_scatter dp 64 bytes", 205, 215),
        event(**launch, start=110, end=115, correlation=1),
        event(**launch, start=210, end=212, correlation=2),
        event(**launch, start=310, end=312, correlation=3),
        event("kernel", "void gemm<float>(int)", 400, 600, 7, correlation=1, stream=7),
        event("kernel", "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(x)", 500, 800, 9, correlation=2, stream=9),
        event("gpu_memcpy", "Memcpy DtoH", 850, 900, 7, correlation=3, stream=7),
    ]
    found = analysed(read_chrome(written(tmp_path / "rank-0.json.gz", events)))
    assert found.on_gpu and found.spent == Spent(1_000_000, 250_000, 200_000)
    assert found.modules["output_layer forward"] == Spent(100_000, 200_000, 0)
    assert found.phases[names.OPTIMIZER] == Spent(700_000, 50_000, 0)
    (row, _) = found.axes
    assert (row.axis, row.size_bytes, row.time_ns, row.exposed_ns) == ("dp", 64, 300_000, 200_000)


def test_the_groups_that_torch_has_noted_name_an_axis(tmp_path: Path) -> None:
    arguments = {"Collective name": "_allgather_base", "In msg nelems": 10, "dtype": "BFloat16"}
    events = [
        event("user_annotation", "step: 3", 0, 1000),
        event("kernel", "ncclDevKernel_AllGather", 0, 10, 9, **arguments, **{"Process Group Name": "23"}),
    ]
    found = analysed(read_chrome(written(tmp_path / "rank-0.json.gz", events, axes={"23": "cp"})))
    assert (found.axes[0].axis, found.axes[1].operation, found.axes[0].size_bytes) == ("cp", "all_gather", 20)


def test_exchanges_of_one_kind_are_told_apart_by_size_and_order() -> None:
    def exchange(start: int, size: int) -> Exchange:
        return Exchange(start, start + 5, start, "all_reduce", "", size)

    asked = [
        Asked(start, start + 1, Exchanged("all_reduce", axis, size))
        for start, axis, size in ((0, "dp", 8), (1, "tp", 4), (20, "pp", 4))
    ]
    found = matched([exchange(2, 4), exchange(3, 8), exchange(21, 4)], asked)
    assert [one.axis for one in found] == ["tp", "dp", "pp"], "two at once need not start in their order"
    assert matched([exchange(2, 4)], [])[0].axis == "unknown"
    kernel = Exchange(22, 30, 22, "send/recv", "", 0)
    assert matched([kernel], asked)[0][3:] == ("all_reduce", "pp", 4), "the last that was asked for"


def test_the_report_prints_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run" / "profile"
    folder.mkdir(parents=True)
    for rank, slow in enumerate((0, 100)):
        written(folder / f"rank-{rank}.json.gz", cpu_step(slow), rank)
    assert profile.report("profile report", [str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    for part in (
        "gradient norm",
        "decoder.layers.*.mlp forward",
        "all_reduce",
        "aten::addmm",
        "slowest: rank 1, 0.850 ms",
    ):
        assert part in text
    assert profile.report("profile report", [str(tmp_path / "run"), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["slowest"]["rank"] == 1 and numbers["ranks"][0]["phases"]["data"]["wall_ns"] == 100_000


def test_a_trace_without_marked_steps_counts_as_a_whole(tmp_path: Path) -> None:
    path = written(
        tmp_path / "rank-0.json.gz", [event("cpu_op", "aten::mm", 10, 30), event("cpu_op", "aten::mm", 40, 50)]
    )
    report = report_of([path])
    assert report.ranks[0].spent == Spent(40_000, 30_000, 0)
    assert "no step is marked" in text_of(report)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", gzip.compress(b'{"traceEvents"')])
def test_what_is_no_trace_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / ("rank-0.json.gz" if content[:1] == b"\x1f" else "rank-0.json")
    path.write_bytes(content)
    with pytest.raises(DataError, match="no Chrome trace"):
        report_of([path])


def test_missing_and_doubled_traces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        traces_of([tmp_path / "nothing"])
    with pytest.raises(DataError, match="holds no rank-N"):
        traces_of([tmp_path])
    (tmp_path / "rank-0.nsys-rep").touch()
    with pytest.raises(DataError, match="nsys export --type sqlite"):
        traces_of([tmp_path])
    paths = [written(tmp_path / f"{name}.json.gz", cpu_step()) for name in "ab"]
    with pytest.raises(DataError, match="both of rank 0"):
        report_of(paths)


def test_a_report_needs_no_torch() -> None:
    code = "import sys; from megatron_slm.profile import compare, report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
