"""What must be the same on every node, and the node on which it is not, by name. No torch."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from megatron_slm.doctor.result import EXCLUDE, Result, State

MISSING = "none"


def differing(facts: Mapping[str, Mapping[str, str]], failing: frozenset[str]) -> Iterator[Result]:
    """Every fact in which a host differs from most others, and one line if there is none.

    Args:
        facts: host -> fact -> value.
        failing: facts whose difference is a failure; of the others it is a warning.
    """
    if len(facts) < 2:
        return
    found = False
    for fact in sorted({name for own in facts.values() for name in own}):
        values = {host: own.get(fact, MISSING) for host, own in facts.items()}
        usual = Counter(values.values()).most_common(1)[0][0]
        for host, value in values.items():
            if value != usual:
                found = True
                state: State = "fail" if fact in failing else "warn"
                remedy = f"Make {host} like the others: {fact} {usual}; or {EXCLUDE}."
                yield Result("same on all nodes", fact, state, f"{host} has {value}", f"{usual}", remedy, host)
    if not found:
        value = f"{len(next(iter(facts.values())))} facts equal on {len(facts)} nodes"
        yield Result("same on all nodes", "packages, driver, GPUs", "ok", value)


def pinned(cores: Mapping[int, list[int]], hosts: Sequence[str], threads: int) -> Iterator[Result]:
    """Ranks of one machine that were given the same few cores, which leaves the others idle.

    Args:
        cores: rank -> those it may run on.
        hosts: rank -> its machine.
        threads: of a rank.
    """
    found = False
    for host in dict.fromkeys(hosts):
        here = {rank: tuple(own) for rank, own in cores.items() if hosts[rank] == host}
        all_cores = {core for own in here.values() for core in own}
        for own in dict.fromkeys(here.values()):
            sharing = [rank for rank, other in here.items() if other == own]
            if len(sharing) * threads > len(own) < len(all_cores):
                found = True
                value = f"ranks {', '.join(map(str, sharing))} on {host} share core {', '.join(map(str, own))}"
                remedy = "Bind each rank to cores of its own (srun --cpu-bind=cores -c N, mpirun --bind-to core)."
                yield Result("cores", "pinning", "warn", value, "cores of its own for each rank", remedy, host)
    if not found:
        yield Result("cores", "pinning", "ok", "no rank is bound to a core of another's")


def crowded(cores: Mapping[int, list[int]], hosts: Sequence[str], threads: int) -> float:
    """Share of its time that the median rank waits for a core when all compute and nothing else runs."""
    shares = []
    for host in hosts:
        here = [set(own) for rank, own in cores.items() if hosts[rank] == host]
        shares.append(max(0.0, 1.0 - len(set().union(*here)) / (threads * len(here))))
    return statistics.median(shares)


def same_cores(cores: Mapping[int, list[int]], hosts: Sequence[str]) -> dict[int, int]:
    """Rank -> the first rank of its machine that may run on the same cores."""
    first: dict[tuple[str, tuple[int, ...]], int] = {}
    return {rank: first.setdefault((hosts[rank], tuple(own)), rank) for rank, own in cores.items()}
