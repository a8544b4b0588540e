"""How far a mixture strays from its shares, over many weights and all prefixes; and what a look-up costs.

    python tests/bench/mixture.py [--quick]

The deviation is that of the loader's own order: samples of a source among the first ``p`` of the run, less what the
weights, exactly as they were typed, amount to up to ``p``, for every source and every ``p``. Weight vectors are random,
from equal to one part in thousands, with 2 to 50 sources, and have three decimals on any scale or six in shares of 1.
They stay; or they change five times, each weight by up to a factor of two, while
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

from megatron_slm.config.mixture_text import weights as typed_weights
from megatron_slm.data.interleave import LONGEST_PERIOD, quantised, turns
from megatron_slm.data.mixture import MixtureOrder, Phase, Source
from megatron_slm.data.order import SampleOrder

SPREADS = (0.05, 0.5, 1.5, 3.0)
PHASES = 6
FINE_EVERY = 5
"""One weight vector in so many has six decimals: its periods of a million places take most of the time."""

Typed = list[tuple[int, dict[str, Fraction]]]


def main() -> None:
    """Print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer weight vectors, within a minute")
    quick: bool = parser.parse_args().quick
    state = np.random.default_rng(1)
    vectors, samples = (25, 5000) if quick else (500, 20_000)
    kinds = {"shares stay": (1, False), "shares change": (PHASES, False), "shares drawn anew": (PHASES, True)}
    worst = dict.fromkeys(kinds, 0.0)
    longest = 0
    for number in range(vectors):
        sources = int(state.integers(2, 51))
        for kind, (phases, anew) in kinds.items():
            spread, fine = SPREADS[number % len(SPREADS)], number % FINE_EVERY == 0
            typed = random_weights(state, sources, phases, anew=anew, spread=spread, fine=fine)
            order = order_of(sources, typed)
            worst[kind] = max(worst[kind], deviation(order, typed, samples))
            longest = max(longest, sum(part for _, part in order.phases[0].parts))
            turns.cache_clear()
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
        f"table_ms_{LONGEST_PERIOD}_places": round(max(table.values()), 1),
    }
    print(json.dumps(record))


def random_weights(
    state: np.random.Generator, sources: int, phases: int, *, anew: bool, spread: float, fine: bool
) -> Typed:
    """Sources that join one after another. With ``anew`` every phase draws its weights by itself, and drops some."""
    joins = state.integers(0, phases, sources)
    joins[0] = 0
    weights = state.lognormal(0, spread, sources)
    listed, start = [], 0
    for number in range(phases):
        held = np.where(joins > number, 0, np.round(weights, 3) + 0.001)
        if anew:
            held[1:][state.random(sources - 1) < 0.3] = 0
        texts = decimals(held, fine=fine)
        listed.append((start, typed_weights([f"source{source}={text}" for source, text in enumerate(texts)])))
        start += int(state.integers(1, 800))
        weights = state.lognormal(0, spread, sources) if anew else weights * state.uniform(0.5, 2, sources)
    return listed


def decimals(weights: np.ndarray, *, fine: bool) -> list[str]:
    """The weights as somebody would type them: three decimals, or six that add up to 1."""
    if not fine:
        return [f"{weight:.3f}" for weight in weights]
    return [f"{part / 10**6:.6f}" for part in quantised([Fraction(weight) for weight in weights.tolist()], 10**6)]


def order_of(sources: int, typed: Typed) -> MixtureOrder:
    """The order of a run with these weights."""
    names = [f"source{number}" for number in range(sources)]
    return MixtureOrder(
        tuple(Source(name, SampleOrder(1000, 1, name, 8)) for name in names),
        tuple(Phase.of(start, weights) for start, weights in typed),
    )


def deviation(order: MixtureOrder, typed: Typed, samples: int) -> float:
    """Worst distance of a count from what the typed weights amount to, over all sources and prefixes."""
    numbers, _, _ = order.sample_ids(0, samples)
    stops = [*(start for start, _ in typed[1:]), samples]
    worst = 0.0
    for number, source in enumerate(order.sources):
        shares = [
            np.full(stop - start, float(weights[source.name] / sum(weights.values())))
            for (start, weights), stop in zip(typed, stops, strict=True)
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
