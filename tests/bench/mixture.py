"""How far a mixture strays from its shares, over many weights and all prefixes; and what a look-up costs.

    python tests/bench/mixture.py [--quick]

The deviation is that of the loader's own order: samples of a source among the first ``p`` of the run, less what its
shares up to ``p`` amount to, for every source and every ``p``. Weight vectors are random, from equal to one part in
thousands, with 2 to 50 sources. They stay; or they change five times, each weight by up to a factor of two, while
sources join; or, by itself, they are all drawn anew five times and sources end. No order that does not know of a change
before it comes can keep within one sample then: two sources that are both owed 0.8 and get half of what follows each
are both a sample and more behind after the next. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from fractions import Fraction

import numpy as np

from megatron_slm.data.interleave import LONGEST_PERIOD, turns
from megatron_slm.data.mixture import MixtureOrder, Phase, Source
from megatron_slm.data.order import SampleOrder

SPREADS = (0.05, 0.5, 1.5, 3.0)
PHASES = 6


def main() -> None:
    """Print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer weight vectors, within a minute")
    quick: bool = parser.parse_args().quick
    state = np.random.default_rng(1)
    vectors, samples = (25, 5000) if quick else (1000, 20_000)
    kinds = {"shares stay": (1, False), "shares change": (PHASES, False), "shares drawn anew": (PHASES, True)}
    worst = dict.fromkeys(kinds, 0.0)
    longest = 0
    for number in range(vectors):
        sources = int(state.integers(2, 51))
        for kind, (phases, anew) in kinds.items():
            order = random_mixture(state, sources, phases, anew=anew, spread=SPREADS[number % len(SPREADS)])
            worst[kind] = max(worst[kind], deviation(order, samples))
            longest = max(longest, sum(part for _, part in order.phases[0].parts))
    print(f"{vectors} weight vectors of 2 to 50 sources, periods up to {longest}, every prefix up to {samples}")
    for kind, value in worst.items():
        print(f"worst deviation from the shares, {kind:<18}: {value:.4f} samples")
    table = {sources: table_milliseconds(sources, LONGEST_PERIOD) for sources in (2, 10, 50)}
    print(f"\ntable of {LONGEST_PERIOD} places, built once a run: " + time_list(table, "sources", "ms"))
    print("table of 1000 places (loss-aware): " + time_list({10: table_milliseconds(10, 1000)}, "sources", "ms"))
    lookups = {position: lookup_microseconds(position) for position in (10**3, 10**6, 10**9, 10**12)}
    print("look-up of one position: " + time_list(lookups, "at", "us"))
    record = {
        "worst_share_error_samples": round(max(worst["shares stay"], worst["shares change"]), 4),
        "worst_share_error_samples_shares_stay": round(worst["shares stay"], 4),
        "worst_share_error_samples_shares_change": round(worst["shares change"], 4),
        "worst_share_error_samples_shares_drawn_anew": round(worst["shares drawn anew"], 4),
        "lookup_us_by_position": {f"1e{len(str(at)) - 1}": round(value, 2) for at, value in lookups.items()},
        "table_ms_65536_places": round(max(table.values()), 1),
    }
    print(json.dumps(record))


def random_mixture(state: np.random.Generator, sources: int, phases: int, *, anew: bool, spread: float) -> MixtureOrder:
    """Sources that join one after another. With ``anew`` every phase draws its weights by itself, and drops some."""
    names = [f"source{number}" for number in range(sources)]
    joins = state.integers(0, phases, sources)
    joins[0] = 0
    weights = state.lognormal(0, spread, sources)
    listed, start = [], 0
    for number in range(phases):
        held = np.where(joins > number, 0, np.round(weights, 3) + 0.001)
        if anew:
            held[1:][state.random(sources - 1) < 0.3] = 0
        exact = {name: Fraction(str(round(float(value), 3))) for name, value in zip(names, held, strict=True)}
        listed.append(Phase.of(start, exact))
        start += int(state.integers(1, 800))
        weights = state.lognormal(0, spread, sources) if anew else weights * state.uniform(0.5, 2, sources)
    return MixtureOrder(tuple(Source(name, SampleOrder(1000, 1, name, 8)) for name in names), tuple(listed))


def deviation(order: MixtureOrder, samples: int) -> float:
    """Worst distance of a count from what the shares amount to, over all sources and prefixes."""
    numbers, _, _ = order.sample_ids(0, samples)
    stops = [*(phase.start for phase in order.phases[1:]), samples]
    worst = 0.0
    for number, source in enumerate(order.sources):
        shares = [
            np.full(stop - phase.start, float(phase.shares.get(source.name, 0)))
            for phase, stop in zip(order.phases, stops, strict=True)
        ]
        worst = max(worst, float(np.abs(np.cumsum(numbers == number) - np.cumsum(np.concatenate(shares))).max()))
    return worst


def table_milliseconds(sources: int, places: int) -> float:
    """Time to lay out one period."""
    parts = (*range(2, 1 + sources), places - sum(range(2, 1 + sources)))

    def build() -> float:
        start = time.perf_counter()
        turns.__wrapped__(parts)
        return time.perf_counter() - start

    return 1e3 * statistics.median(build() for _ in range(5))


def lookup_microseconds(position: int) -> float:
    """Time of one scalar look-up in a mixture of ten sources with a change of shares."""
    names = [f"source{number}" for number in range(10)]
    sources = tuple(Source(name, SampleOrder(10**9 + number, 1, name, 8)) for number, name in enumerate(names))
    first = Phase.of(0, {name: Fraction(number + 1) for number, name in enumerate(names)})
    second = Phase.of(500, {name: Fraction(20 - number) for number, name in enumerate(names)})
    order = MixtureOrder(sources, (first, second))
    order.sample_id(0)

    def read() -> float:
        start = time.perf_counter()
        for offset in range(500):
            order.sample_id(position + offset)
        return (time.perf_counter() - start) / 500

    return 1e6 * statistics.median(read() for _ in range(9))


def time_list(times: dict[int, float], what: str, unit: str) -> str:
    """``sources 2: 80.1 ms, ...``."""
    return ", ".join(f"{what} {key:,}: {value:.1f} {unit}" for key, value in times.items())


if __name__ == "__main__":
    main()
