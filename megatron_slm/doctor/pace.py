"""Which rank is slower than the others, and which link: verdicts over what was measured. No torch.

A job runs at the pace of its slowest rank, so one that is slow is a failure of the whole. What is measured once is not
believed: a rank or a pair that looks slow is measured again, and its best counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_slm.doctor.result import EXCLUDE, Result, State

SLOW = {"cuda": 1.15, "cpu": 2.5}
"""Times the median of all ranks beyond which a rank is slow. GPUs of one kind differ by a few percent; three ranks on
two cores by two."""
FAILING = 2.0
SLOW_PAIR, LATE_PAIR, LATE_SECONDS = 3.0, 5.0, 1e-3
"""The same for the bandwidth of a pair of ranks within its kind (inside a node, between nodes), and for its latency,
which has a scheduler in it: a pair is late only if it is so much later, too."""
SLOW_LOOPBACK, LATE_LOOPBACK_SECONDS = 8.0, 5e-3
"""For CPU ranks of one machine: between them is no wire, but whatever else runs on its cores."""
BUSY = 0.3
"""Share of its time that the median rank may wait for a core beyond what the ranks take from one another."""
LEAST_SHARE = 0.01
"""Of its time that a rank computes; less is not to be told from none."""
FLOOR_BETWEEN = (5e-3, 0.05)
"""Seconds and GB/s that two nodes of a cluster reach; below, no comparison with other pairs is needed (1 GbE: 0.12)."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class Timed:
    """One rank: seconds of a piece of work, and the share of them that it waited for a core (None: not known)."""

    seconds: float
    waited: float | None


@dataclass(frozen=True)
class Ping:
    """One pair of ranks: seconds of a small message one way, and GB/s of a large one."""

    seconds: float
    gb_per_second: float

    def best(self, other: Ping) -> Ping:
        """The better of two measurements, in each."""
        return Ping(min(self.seconds, other.seconds), max(self.gb_per_second, other.gb_per_second))

    def __str__(self) -> str:
        return f"{1e6 * self.seconds:.0f} us, {self.gb_per_second:.3g} GB/s"


@dataclass(frozen=True)
class Ranks:
    """Where the ranks are."""

    hosts: Sequence[str]
    device: str
    """``cuda`` or ``cpu``."""
    busy: bool = False
    """Whether other programs take so much of the cores that what CPU ranks exchange says nothing of their links."""

    def name(self, rank: int) -> str:
        """A rank with its host."""
        return f"rank {rank} on {self.hosts[rank]}"

    def crosses(self, pair: Pair) -> bool:
        """Whether the two are on different machines."""
        return self.hosts[pair[0]] != self.hosts[pair[1]]


def busy(waited: Mapping[int, float], crowded: float) -> bool:
    """Whether so much else runs that the times of exchanges between CPU ranks are those of the scheduler.

    Args:
        waited: rank -> share of its time that it has waited for a core.
        crowded: the share that the ranks alone explain: four of one thread on two cores wait half of the time.
    """
    return bool(waited) and statistics.median(waited.values()) > crowded + BUSY


def busy_result(waited: Mapping[int, float], crowded: float) -> Result:
    """In the place of comparisons of exchanges between CPU ranks."""
    value = (
        f"other programs take the cores: ranks waited {100 * statistics.median(waited.values()):.0f} % of the time for "
        "one (median), and what they exchange on one machine is not compared"
    )
    remedy = "End what else runs there (top), or ask for cores of this job's own (--exclusive), and examine again."
    return Result("pace", "cores", "warn", value, f"{100 * crowded:.0f} %, as they take from one another", remedy)


def evened(timed: Mapping[int, Timed], same_cores: Mapping[int, int]) -> dict[int, float]:
    """Rank -> seconds, as if those that may run on the same cores had waited alike for one.

    Which of them the scheduler lets wait is chance; a rank that is bound to a core of its own keeps its waiting.

    Args:
        same_cores: rank -> the first rank that is bound to the same cores.
    """
    found = {}
    for rank, one in timed.items():
        alike = [other.waited for peer, other in timed.items() if same_cores.get(peer) == same_cores.get(rank)]
        known = [waited for waited in alike if waited is not None]
        if one.waited is None or not known:
            found[rank] = one.seconds
        else:
            computing = one.seconds * max(LEAST_SHARE, 1.0 - one.waited)
            found[rank] = computing / max(LEAST_SHARE, 1.0 - statistics.fmean(known))
    return found


def slow_ranks(seconds: Mapping[int, float], ranks: Ranks) -> dict[int, float]:
    """Rank -> how many times the others' median its seconds are, of those that are slow."""
    if len(seconds) < 2:
        return {}
    found = {}
    for rank, own in seconds.items():
        others = statistics.median(value for other, value in seconds.items() if other != rank)
        if own > SLOW[ranks.device] * others:
            found[rank] = own / others
    return found


def pace_results(
    name: str, seconds: Mapping[int, float], ranks: Ranks, show: Callable[[float], str], why: Mapping[int, str]
) -> Iterator[Result]:
    """One line for every slow rank, or one that says none is.

    Args:
        name: of the probe.
        seconds: rank -> its best.
        show: seconds -> what they mean (GFLOP/s, GB/s).
        why: rank -> what else is known of it.
    """
    slow = slow_ranks(seconds, ranks)
    sound = [value for rank, value in seconds.items() if rank not in slow]
    usual = show(statistics.median(sound or seconds.values()))
    for rank, factor in slow.items():
        state: State = "fail" if factor >= FAILING else "warn"
        value = f"{ranks.name(rank)} is {factor:.1f} times slower than the others: {show(seconds[rank])}"
        value += f" ({why[rank]})" if why.get(rank) else ""
        remedy = f"Look what else runs on its cores or GPU (top, nvidia-smi), or {EXCLUDE}."
        yield Result("pace", name, state, value, usual, remedy, ranks.hosts[rank])
    if not slow:
        value = usual if len(seconds) == 1 else f"{usual}, slowest rank {show(max(seconds.values()))}"
        yield Result("pace", name, "ok", value, f"no rank {SLOW[ranks.device]:g} times slower than the others")


def slow_pairs(pings: Mapping[Pair, Ping], ranks: Ranks) -> dict[Pair, str]:
    """Pairs that are slow against the others of their kind -> in what."""
    found = {}
    for pair, ping in pings.items():
        crosses = ranks.crosses(pair)
        if ranks.busy and not crosses:
            continue
        peers = [one for other, one in pings.items() if other != pair and ranks.crosses(other) == crosses]
        if reason := _slow(ping, peers, crosses, loopback=not crosses and ranks.device == "cpu"):
            found[pair] = reason
    return found


def _slow(ping: Ping, peers: Sequence[Ping], crosses: bool, *, loopback: bool) -> str:
    """In what a pair is slow; empty where it is not."""
    factor, late = (SLOW_LOOPBACK, LATE_LOOPBACK_SECONDS) if loopback else (SLOW_PAIR, LATE_SECONDS)
    if peers:
        # Of an even number the better one: with one slow machine among three, two of three pairs are slow.
        seconds = statistics.median_low(one.seconds for one in peers)
        rate = statistics.median_high(one.gb_per_second for one in peers)
        if ping.gb_per_second * factor < rate:
            return f"{ping.gb_per_second:.3g} GB/s where others reach {rate:.3g}"
        if ping.seconds > max(LATE_PAIR * seconds, seconds + late):
            return f"{1e6 * ping.seconds:.0f} us where others take {1e6 * seconds:.0f}"
    if crosses and ping.seconds > FLOOR_BETWEEN[0]:
        most = 1e6 * FLOOR_BETWEEN[0]
        return f"{1e6 * ping.seconds:.0f} us between nodes, where clusters take {most:.0f} at most"
    if crosses and ping.gb_per_second < FLOOR_BETWEEN[1]:
        return f"{ping.gb_per_second:.3g} GB/s between nodes, where clusters reach {FLOOR_BETWEEN[1]:g}"
    return ""


def ring(world: int) -> list[list[Pair]]:
    """Every rank with the next one, in rounds in which no rank has two partners: n pairs for n ranks."""
    if world < 2:
        return []
    pairs = [(rank, (rank + 1) % world) for rank in range(world if world > 2 else 1)]
    rounds = [pairs[0 : world - world % 2 : 2], pairs[1::2], pairs[world - 1 :] if world % 2 and world > 2 else []]
    return [one for one in rounds if one]


def questions(pings: Mapping[Pair, Ping], slow: Mapping[Pair, str], ranks: Ranks) -> list[Pair]:
    """Pairs to measure next, to tell a slow machine (or rank) from a slow link; few, however large the job.

    What has a sound pair is itself sound. What has none is slow if two sound ones agree on it: those that the ring has
    not asked are asked here.
    """
    found = []
    for crosses in (False, True):
        sound = _sound(pings, slow, ranks, crosses)
        for unit, accusers in _accusers(slow, ranks, crosses, sound).items():
            rank = next(rank for pair in slow for rank in pair if _unit(rank, crosses, ranks) == unit)
            free = [
                one
                for one in range(len(ranks.hosts))
                if (other := _unit(one, crosses, ranks)) in sound - accusers
                and other != unit
                and ranks.crosses((one, rank)) == crosses
            ]
            if len(accusers) < 2 and free:
                found.append((free[0], rank))
    return found


def blamed(
    pings: Mapping[Pair, Ping], slow: Mapping[Pair, str], ranks: Ranks
) -> tuple[dict[int, str], dict[Pair, str]]:
    """Ranks (of slow machines: all that were measured) that two sound ones agree on, and the slow pairs without any."""
    guilty: dict[int, str] = {}
    for crosses in (False, True):
        sound = _sound(pings, slow, ranks, crosses)
        found = {unit for unit, accusers in _accusers(slow, ranks, crosses, sound).items() if len(accusers) >= 2}
        for pair, reason in slow.items():
            for rank in pair:
                if ranks.crosses(pair) == crosses and _unit(rank, crosses, ranks) in found:
                    guilty.setdefault(rank, reason)
    return guilty, {pair: reason for pair, reason in slow.items() if not guilty.keys() & set(pair)}


def _unit(rank: int, crosses: bool, ranks: Ranks) -> str:
    """What may be slow in a pair: between nodes a machine, inside one a rank."""
    return ranks.hosts[rank] if crosses else f"{rank} on {ranks.hosts[rank]}"


def _sound(pings: Mapping[Pair, Ping], slow: Mapping[Pair, str], ranks: Ranks, crosses: bool) -> set[str]:
    """Whatever has at least one pair that is not slow."""
    pairs = [pair for pair in pings if pair not in slow and ranks.crosses(pair) == crosses]
    return {_unit(rank, crosses, ranks) for pair in pairs for rank in pair}


def _accusers(slow: Mapping[Pair, str], ranks: Ranks, crosses: bool, sound: set[str]) -> dict[str, set[str]]:
    """What has no sound pair -> the sound ones that it is slow with."""
    found: dict[str, set[str]] = {}
    for pair in slow:
        if ranks.crosses(pair) == crosses:
            first, second = (_unit(rank, crosses, ranks) for rank in pair)
            for unit, other in ((first, second), (second, first)):
                if unit not in sound:
                    found.setdefault(unit, set()).update({other} & sound)
    return found


def pair_results(pings: Mapping[Pair, Ping], slow: Mapping[Pair, str], ranks: Ranks) -> Iterator[Result]:
    """One line for each kind of link, for every slow machine or rank, and for every slow link.

    Args:
        pings: all pairs that were measured.
        slow: those that stayed slow -> in what.
    """
    for crosses, name in ((False, "inside a node"), (True, "between nodes")):
        sound = [one for pair, one in pings.items() if ranks.crosses(pair) == crosses and pair not in slow]
        if sound:
            usual = Ping(
                *(statistics.median(getattr(one, key) for one in sound) for key in ("seconds", "gb_per_second"))
            )
            yield Result("links", name, "ok", f"{len(sound)} pair(s): {usual} (median)")
    guilty, links = blamed(pings, slow, ranks)
    for host in dict.fromkeys(ranks.hosts[rank] for rank in guilty):
        mine = sorted(rank for rank in guilty if ranks.hosts[rank] == host)
        who = f"{host} (rank {', '.join(map(str, mine))})"
        value = f"{who} is slow with every rank: {guilty[mine[0]]}"
        remedy = f"Look at its network card, cable and switch port (ethtool, ibstat), or {EXCLUDE}."
        yield Result("links", "slow node", "fail", value, "as fast as the others", remedy, host)
    for pair, reason in links.items():
        value = f"between {ranks.name(pair[0])} and {ranks.name(pair[1])}: {reason}"
        remedy = f"Look at the way between the two (cables, switch, interface names), or {EXCLUDE}."
        yield Result("links", "slow link", "fail", value, "as fast as the others", remedy)
