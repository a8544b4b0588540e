"""How far the clocks of the nodes are apart, as NTP measures it (RFC 5905, section 8). No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from megatron_slm.doctor.result import Result, State

SUBJECT = "clocks"
WARN_S, FAIL_S = 0.1, 60.0
"""Logs of several nodes cannot be put in order beyond the first; certificates, locks and make break at the second."""

Exchange = tuple[float, float, float, float]
"""One question and its answer, in seconds: sent (asker's clock), received, answered (the other's), back (asker's)."""


def offset(exchanges: Sequence[Exchange]) -> tuple[float, float]:
    """Offset of the other clock to the asker's, and its largest error: half of the round trip; of the quickest."""
    sent, received, answered, back = min(exchanges, key=lambda one: (one[3] - one[0]) - (one[2] - one[1]))
    round_trip = (back - sent) - (answered - received)
    return ((received - sent) + (answered - back)) / 2, round_trip / 2


def judged(offsets: Mapping[str, tuple[float, float]], reference: str) -> Iterator[Result]:
    """One line for every host that is certainly off, and one for the others.

    Args:
        offsets: host -> (offset to rank 0's clock, error), in seconds.
        reference: rank 0's host.
    """
    on_time = []
    for host, (away, error) in offsets.items():
        certain = abs(away) - error
        if certain <= WARN_S:
            on_time.append(f"{host} {_shown(away, error)}")
            continue
        state: State = "fail" if certain > FAIL_S else "warn"
        remedy = "Start the time service on it (chronyc makestep, timedatectl set-ntp true)."
        value = f"{host} is {_shown(away, error)} off {reference}"
        yield Result(SUBJECT, "skew", state, value, f"{WARN_S:g} s", remedy, host)
    if on_time:
        yield Result(SUBJECT, "skew", "ok", f"against {reference}: {', '.join(on_time)}", f"{WARN_S:g} s")


def _shown(away: float, error: float) -> str:
    return f"{1e3 * away:+.2f} ms (within {1e3 * error:.2f})"
