"""Verdicts about ranks that stand still, are slow or end badly, from what they said of themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_slm.commands import restart as verbs
from megatron_slm.errors import CheckpointError, LogError
from megatron_slm.launch.network import lost_peer
from megatron_slm.survival.hang import Standing, judge
from megatron_slm.survival.place import Place
from megatron_slm.survival.restart import MAX_RESTARTS, Decision, End, after_end, decide, read_ends
from megatron_slm.survival.straggler import Measured, slow_ranks

AXES = {(0, 1): "tp", (2, 3): "tp", (0, 2): "dp", (1, 3): "dp", (0, 1, 2, 3): "world"}
OWN = Place("", (), "data/loader.py:88 in read")


def reduce_of(*ranks: int, operation: str = "all_reduce") -> Place:
    return Place(operation, ranks, "tensor_parallel/mappings.py:31 in _reduce")


def standing(rank: int, place: Place, step: int = 17) -> Standing:
    return Standing(rank, "node1", 100 + rank, step, "forward and backward", 12.0, place)


def test_a_silent_rank_is_the_cause_and_whoever_waits_for_it_is_listed() -> None:
    places = {0: reduce_of(0, 2), 1: reduce_of(1, 3), 3: reduce_of(2, 3)}
    found = judge([standing(*one) for one in places.items()], {2: "node2, process 9: stopped"}, AXES)
    assert found.cause.startswith("no rank has moved on for 12 s, at step 17: rank 2 says nothing (node2, process 9")
    assert "it blocks all_reduce of dp [0, 2]" in found.cause
    waiting = [line for line in found.lines if "it waits for rank" in line]
    assert [line.split(" (")[0] + line[-2:] for line in waiting] == ["rank 0 2", "rank 1 3", "rank 3 2"], found.text


def test_a_rank_with_work_of_its_own_is_the_cause() -> None:
    found = judge([standing(0, reduce_of(0, 1)), standing(1, OWN)], {}, AXES)
    assert "rank 1 is at work of its own in data/loader.py:88 in read" in found.cause
    assert "it blocks all_reduce of tp [0, 1]" in found.cause


def test_different_exchanges_of_one_group_are_the_cause() -> None:
    gather = reduce_of(0, 1, operation="all_gather")
    found = judge([standing(0, reduce_of(0, 1)), standing(1, gather)], {}, AXES)
    assert "tp [0, 1] are in different exchanges (all_gather, all_reduce)" in found.cause, found.text


def test_a_circle_of_groups_is_the_cause() -> None:
    places = [reduce_of(0, 1), reduce_of(1, 3), reduce_of(0, 2), reduce_of(2, 3)]
    found = judge([standing(rank, place) for rank, place in enumerate(places)], {}, AXES)
    assert "wait for each other in a circle" in found.cause, found.text


def test_complete_exchanges_in_which_nothing_arrives_are_the_network() -> None:
    complete = [standing(rank, reduce_of(0, 1, 2, 3)) for rank in range(4)]
    assert "the network between them is lost" in judge(complete, {}, AXES).cause
    pipeline = [
        standing(0, Place("recv_backward", (2,), "p2p.py:1 in _communicate")),
        standing(2, Place("recv_forward", (0,), "p2p.py:1 in _communicate")),
    ]
    assert "the network between them is lost" in judge(pipeline, {}, AXES).cause, "a pair that waits for each other"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:29511",
            "connection closed by peer 10.0.0.2: its rank has ended",
        ),
        (
            "[..unbound_buffer.cc:81] Timed out waiting 6000ms for recv operation to complete",
            "timed out waiting for 6 s for another rank",
        ),
        (
            "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=1, "
            "NumelOut=1, Timeout(ms)=600000) ran for 600021 milliseconds before timing out.",
            "ALLREDUCE of NCCL timed out waiting for 600 s",
        ),
        ("Timed out after 61 seconds waiting for clients. 3/4 clients joined.", "only 3/4 ranks came"),
        (
            "The client socket has timed out after 60000ms while trying to connect to (10.0.0.1, 29500).",
            "nobody answered at 10.0.0.1 port 29500 for 60 s",
        ),
        (
            "NCCL error: ncclRemoteError: A call failed possibly due to a network error or a remote process exited "
            "prematurely.",
            "NCCL says that a remote process exited",
        ),
        ("writev [127.0.0.1]:5: Broken pipe", "broken pipe"),
    ],
)
def test_words_of_a_lost_network(error: str, said: str) -> None:
    assert said in (lost_peer(RuntimeError(error)) or ""), "one sentence"


def test_other_errors_are_not_the_network() -> None:
    assert lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert lost_peer(ValueError("connection closed by peer")) is None, "only of torch's and the system's kinds"


def test_slow_ranks_are_compared_with_ranks_of_the_same_work() -> None:
    peers = [[0, 1], [0, 1], [2, 3], [2, 3]]
    stages = [Measured(10.0, 0.0), Measured(11.0, 0.0), Measured(40.0, 0.0), Measured(41.0, 0.0)]
    assert slow_ranks(stages, peers, "work") == [], "another pipeline stage has other work"
    stages[3] = Measured(130.0, 80.0)
    (found,) = slow_ranks(stages, peers, "work")
    assert (found.rank, round(found.ratio, 2)) == (3, 3.25)
    assert found.why == "work, above all in reading data"
    assert [one.rank for one in slow_ranks([Measured(10.0, 0.0), Measured(31.0, 0.0)], [[0], [1]], "work")] == [1]


def ends(*given: tuple[int | None, str]) -> list[End]:
    return [End(0.0, 1, checkpoint, cause) for checkpoint, cause in given]


def test_a_run_that_gets_on_is_started_again_with_the_shortest_pause() -> None:
    decision = decide(ends((10, "killed"), (20, "killed"), (30, "killed")), MAX_RESTARTS)
    assert decision.again and decision.wait_s == 1.0
    assert decision.reason == "restart 3 of 10 from the checkpoint of step 30, after: killed"


def test_pauses_grow_while_no_checkpoint_is_added() -> None:
    given = ends((10, "a"), (10, "b"), (10, "c"), (10, "d"))
    assert [decide(given[:count], MAX_RESTARTS).wait_s for count in range(1, 5)] == [1.0, 4.0, 16.0, 64.0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ends((5, "at step 7"), (5, "at step 8"), (5, "at step 6")),
            "crash loop: 3 starts from the checkpoint of step 5 ended in the same way",
        ),
        (
            ends(*((None, cause) for cause in "abcde")),
            "crash loop: 5 starts from no checkpoint ended without a new one",
        ),
        (ends((1, "a"), (2, "a"), (3, "a")), "all 2 restarts of a day are used"),
    ],
)
def test_a_run_is_given_up(given: list[End], said: str) -> None:
    decision = decide(given, 2 if "2 restarts" in said else MAX_RESTARTS)
    assert not decision.again and decision.reason.startswith(said), decision


def test_the_cause_is_what_a_rank_noted_since_the_last_start(run: Path) -> None:
    tmp_path = run
    line = "2026-01-01 00:00:00\tJob ID: 7\t# GPUs: 4\t{}\t{}\n"
    told = [
        ("Failed", "rank 0: old"),
        ("Starting job", "Iteration: 3"),
        ("Lost", "rank 2: closed"),
        ("Failed", "rank 1"),
    ]
    (tmp_path / "progress.txt").write_text("".join(line.format(*one) for one in told))
    assert after_end(tmp_path, 1).again
    assert read_ends(tmp_path)[-1].cause == "rank 1", "a failure says more than who lost a peer by it"
    (tmp_path / "progress.txt").open("a").write(line.format("Starting job", "Iteration: 3"))
    after_end(tmp_path, 137)
    assert read_ends(tmp_path)[-1].cause == "the ranks ended with exit code 137 and left no word"
    with (tmp_path / "restarts.jsonl").open("a") as file:
        file.write('{"at": 1.0, "co')
    assert len(read_ends(tmp_path)) == 2, "a torn line is left out"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "identity.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("code", [0, 2])
def test_runs_that_are_done_or_refused_are_left(run: Path, code: int) -> None:
    assert not after_end(run, code).again
    assert read_ends(run) == []


def test_stops_count_where_they_have_saved_nothing_new(run: Path) -> None:
    (run / "checkpoints" / "iter_0000005").mkdir(parents=True)
    assert after_end(run, 75).reason == "stopped after a clean save"
    (run / "checkpoints" / "iter_0000010").mkdir()
    assert after_end(run, 75) == Decision(True, 0.0, "stopped after a clean save")
    assert "stopped before anything new was saved; from the checkpoint of step 10" in after_end(run, 75).reason
    assert "crash loop: 3 starts from the checkpoint of step 10" in after_end(run, 75).reason


def test_restarts_are_counted_by_the_day() -> None:
    day = 86400.0
    ends = [End(day * number, 1, number, f"cause {number}") for number in range(20)]
    assert decide(ends, 2).again
    assert not decide([End(10.0 * number, 1, number, "cause") for number in range(20)], 2).again


def test_the_same_hang_of_other_processes_is_the_same_trouble() -> None:
    said = "no rank has moved on for {} s, at step {}: rank 1 says nothing (node1, process {}: stopped)"
    alike = ends(*((5, said.format(seconds, 7 + seconds, 100 * seconds)) for seconds in (7, 8, 9)))
    assert not decide(alike, MAX_RESTARTS).again
    assert decide([*alike[:2], End(0.0, 1, 5, alike[2].cause.replace("rank 1", "rank 2"))], MAX_RESTARTS).again


def test_the_verb_prints_the_pause_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.restart("restart", [str(run), "--code", "1"]) == 0
    assert capsys.readouterr().out.startswith("1 s: restart 1 of 10 from no checkpoint")
    for _ in range(2):
        code = verbs.restart("restart", [str(run), "--code", "1"])
    assert code == 1 and "crash loop" in capsys.readouterr().out
    (run / "corpus").mkdir()
    with pytest.raises(CheckpointError, match="is not a run's directory"):
        verbs.restart("restart", [str(run / "corpus"), "--code", "1"])
    with pytest.raises(CheckpointError, match="is not a run's directory"):
        verbs.restart("restart", [str(run / "none"), "--code", "1"])


def test_a_run_that_cannot_be_written_is_not_started_again(tmp_path: Path) -> None:
    (tmp_path / "restarts.jsonl").mkdir()
    with pytest.raises(LogError, match="cannot be written .*so the run would fail again.*exit code 1"):
        after_end(tmp_path, 1)
