"""Who is slow: verdicts over given measurements; clocks; nodes that differ."""

from __future__ import annotations

import itertools

import pytest

from megatron_slm.doctor import clock, exchanges, nodes, pace
from megatron_slm.doctor.pace import Pair, Ping, Ranks

FAST, SLOW = Ping(20e-6, 10.0), Ping(20e-6, 1.0)


def measured(world: int, is_slow: set[int], links: set[Pair], ranks: Ranks) -> tuple[dict[int, str], dict[Pair, str]]:
    """Whom the doctor blames when these ranks (or links) are slow: the ring, then the questions."""

    def ping(pair: Pair) -> Ping:
        return SLOW if is_slow & set(pair) or pair in links or pair[::-1] in links else FAST

    pings = {pair: ping(pair) for round_ in pace.ring(world) for pair in round_}
    assert len(pings) <= world, "n measurements for n ranks"
    pings |= {pair: ping(pair) for pair in pace.questions(pings, pace.slow_pairs(pings, ranks), ranks)}
    return pace.blamed(pings, pace.slow_pairs(pings, ranks), ranks)


@pytest.mark.parametrize("world", range(2, 10))
def test_the_ring_has_every_neighbour_once_and_nobody_twice_at_a_time(world: int) -> None:
    rounds = pace.ring(world)
    assert len(rounds) <= 3
    for round_ in rounds:
        members = list(itertools.chain(*round_))
        assert len(members) == len(set(members))
    expected = {frozenset((rank, (rank + 1) % world)) for rank in range(world)}
    assert {frozenset(pair) for round_ in rounds for pair in round_} == expected


@pytest.mark.parametrize("world", [3, 4, 5, 8, 17])
def test_a_slow_machine_is_blamed_and_no_other(world: int) -> None:
    ranks = Ranks([f"node{rank}" for rank in range(world)], "cpu")
    for guilty in range(world):
        blamed, links = measured(world, {guilty}, set(), ranks)
        assert (set(blamed), links) == ({guilty}, {}), f"node{guilty} of {world}"


def test_two_slow_neighbours_are_both_blamed() -> None:
    ranks = Ranks([f"node{rank}" for rank in range(8)], "cuda")
    blamed, links = measured(8, {3, 4}, set(), ranks)
    assert set(blamed) == {3, 4}
    assert links == {}


def test_a_slow_link_is_not_blamed_on_its_ends() -> None:
    ranks = Ranks([f"node{rank}" for rank in range(6)], "cuda")
    blamed, links = measured(6, set(), {(2, 3)}, ranks)
    assert blamed == {}
    assert list(links) == [(2, 3)]


def test_a_node_of_several_ranks_is_blamed_as_one() -> None:
    ranks = Ranks([f"node{rank // 2}" for rank in range(8)], "cuda")
    pings = {pair: FAST for round_ in pace.ring(8) for pair in round_}
    pings |= {(3, 4): SLOW, (5, 6): SLOW}  # what leaves node2; inside it all is well
    pings |= dict.fromkeys(pace.questions(pings, pace.slow_pairs(pings, ranks), ranks), FAST)
    results = list(pace.pair_results(pings, pace.slow_pairs(pings, ranks), ranks))
    (failure,) = [one for one in results if one.state == "fail"]
    assert (failure.host, failure.name) == ("node2", "slow node")
    assert failure.value.startswith("node2 (rank 4, 5) is slow with every rank: 1 GB/s where others reach 10")


def test_of_two_nodes_neither_can_be_blamed() -> None:
    ranks = Ranks(["node0", "node1"], "cuda")
    late = Ping(20e-3, 10.0)
    slow = pace.slow_pairs({(0, 1): late}, ranks)
    assert "between nodes" in slow[0, 1], "alone it is held against what a cluster reaches"
    assert pace.blamed({(0, 1): late}, slow, ranks) == ({}, slow)


def test_a_late_pair_is_late_by_more_than_a_scheduler_explains() -> None:
    ranks = Ranks(["node0"] * 4, "cuda")
    pings = {(0, 1): FAST, (1, 2): FAST, (2, 3): Ping(400e-6, 10.0), (3, 0): FAST}
    assert pace.slow_pairs(pings, ranks) == {}, "20 times, but by 0.4 ms"
    assert list(pace.slow_pairs({**pings, (2, 3): Ping(4e-3, 10.0)}, ranks)) == [(2, 3)]


def test_a_slow_rank_is_named_with_its_factor_and_host() -> None:
    ranks = Ranks(["node0", "node0", "node1", "node1"], "cuda")
    seconds = {0: 1.0, 1: 1.02, 2: 0.99, 3: 3.0}
    (line,) = pace.pace_results("memory", seconds, ranks, lambda value: f"{value:g} s", {3: "why"})
    assert (line.state, line.host) == ("fail", "node1")
    assert line.value == "rank 3 on node1 is 3.0 times slower than the others: 3 s (why)"
    (line,) = pace.pace_results("memory", {**seconds, 3: 1.3}, ranks, lambda value: f"{value:g} s", {})
    assert line.state == "warn", "of a GPU 30 % is much, and no failure"
    (line,) = pace.pace_results("memory", {**seconds, 3: 1.05}, ranks, lambda value: f"{value:g} s", {})
    assert line.state == "ok"


def test_on_a_busy_machine_no_loopback_is_compared() -> None:
    waited = {0: 0.9, 1: 0.85, 2: 0.95, 3: 0.99}
    assert pace.busy(waited, crowded=0.5)
    assert not pace.busy({0: 0.5, 1: 0.52, 2: 0.48, 3: 0.97}, crowded=0.5), (
        "one rank whose core is taken is no busy job"
    )
    ranks = Ranks(["node0"] * 4, "cpu", busy=True)
    assert pace.slow_pairs({(0, 1): FAST, (1, 2): FAST, (2, 3): Ping(1.0, 0.001), (3, 0): FAST}, ranks) == {}
    assert pace.busy_result(waited, 0.5).state == "warn", "and that is said"


def test_waiting_for_shared_cores_is_shared_and_for_a_core_of_ones_own_is_not() -> None:
    cores = nodes.same_cores({0: [0, 1], 1: [0, 1], 2: [0, 1], 3: [1]}, ["node0"] * 4)
    assert cores == {0: 0, 1: 0, 2: 0, 3: 3}
    timed = {0: pace.Timed(1.0, 0.0), 1: pace.Timed(4.0, 0.75), 2: pace.Timed(1.0, 0.0), 3: pace.Timed(10.0, 0.9)}
    seconds = pace.evened(timed, cores)
    assert seconds == pytest.approx({0: 4 / 3, 1: 4 / 3, 2: 4 / 3, 3: 10.0})
    assert list(pace.slow_ranks(seconds, Ranks(["node0"] * 4, "cpu"))) == [3]
    slow_chip = pace.evened({**timed, 0: pace.Timed(9.0, 0.0)}, cores)
    assert 0 in pace.slow_ranks(slow_chip, Ranks(["node0"] * 4, "cpu")), "what computes slowly is not excused"
    unknown = {rank: pace.Timed(one.seconds, None) for rank, one in timed.items()}
    assert pace.evened(unknown, cores) == {0: 1.0, 1: 4.0, 2: 1.0, 3: 10.0}


def group(ranks: tuple[int, ...], seconds: float, expected: float | None = None) -> exchanges.Timed:
    return exchanges.Timed("tp", "all_reduce", ranks, 1e-4, seconds, 1 << 20, float(1 << 20), expected)


def test_a_group_is_held_against_the_planner_or_the_others_of_its_axis() -> None:
    sound = [group((0, 1), 0.01), group((2, 3), 0.011), group((4, 5), 0.009)]
    assert exchanges.slow_groups(sound) == []
    slow = [*sound, group((6, 7), 0.08)]
    assert [one.ranks for one in exchanges.slow_groups(slow)] == [(6, 7)]
    lines = list(exchanges.results(slow, exchanges.slow_groups(slow)))
    assert [line.state for line in lines] == ["ok", "fail"]
    assert lines[1].value.startswith("ranks 6, 7: 100 us, 0.0131 GB/s with 1 MiB (80.00 ms), 8.0 times")
    alone = [group((0, 1), 0.03, expected=0.01)]
    assert exchanges.slow_groups(alone) == alone, "one group alone is held against the planner"
    assert [line.state for line in exchanges.results(alone, alone)] == ["warn"]


def test_offset_of_a_clock_is_that_of_the_quickest_exchange() -> None:
    # The other clock is 5 s ahead; 10 ms there, 30 ms back; and once a minute's delay on the way back.
    exchanges_ = [(100.0, 105.01, 105.02, 100.05), (200.0, 205.01, 205.02, 260.0)]
    away, error = clock.offset(exchanges_)
    assert away == pytest.approx(4.99)
    assert error == pytest.approx(0.02)
    assert abs(away - 5.0) <= error, "the truth is within the error"


def test_a_clock_is_off_only_beyond_its_error() -> None:
    found = list(clock.judged({"a": (0.001, 0.0005), "b": (0.3, 0.25), "c": (-0.4, 0.01), "d": (3600.0, 0.1)}, "zero"))
    assert [(one.state, one.host) for one in found] == [("warn", "c"), ("fail", "d"), ("ok", "")]
    assert found[0].value == "c is -400.00 ms (within 10.00) off zero"


def test_the_node_that_differs_is_named_with_the_package() -> None:
    facts = {host: {"torch": "2.13.0", "GPUs": "8 x H100"} for host in ("n0", "n1", "n2")}
    (line,) = nodes.differing(facts, frozenset({"torch"}))
    assert line.state == "ok"
    facts["n1"]["torch"] = "2.12.1"
    del facts["n2"]["GPUs"]
    lines = list(nodes.differing(facts, frozenset({"torch"})))
    assert [(one.state, one.host, one.name, one.value) for one in lines] == [
        ("warn", "n2", "GPUs", "n2 has none"),
        ("fail", "n1", "torch", "n1 has 2.12.1"),
    ]


def test_ranks_bound_to_one_core_are_named() -> None:
    hosts = ["n0"] * 4
    assert [one.state for one in nodes.pinned({rank: [0, 1, 2, 3] for rank in range(4)}, hosts, 1)] == ["ok"]
    assert [one.state for one in nodes.pinned({rank: [rank] for rank in range(4)}, hosts, 1)] == ["ok"]
    (line,) = nodes.pinned({0: [0], 1: [0], 2: [1], 3: [2]}, hosts, 1)
    assert line.value == "ranks 0, 1 on n0 share core 0"
    assert nodes.crowded({0: [0, 1], 1: [0, 1], 2: [0, 1], 3: [0, 1]}, hosts, 1) == 0.5
