"""Where the time of a rank's steps went. Pure functions of what was recorded; no torch.

On a CPU rank every moment of a step is compute (an operator runs), exposed communication (an exchange is on its way and
no operator runs) or host (neither: Python, and whatever blocks it). On a GPU compute and communication are times of the
device, put where the host has asked for them; host is the time in which the device had nothing to do.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_slm.profile import names
from megatron_slm.profile.intervals import Interval, common, total, union, without
from megatron_slm.profile.trace import NOWHERE, Exchange, Place, Places, RankTrace, Segment, segments

OUTSIDE = "outside of any"


@dataclass(frozen=True)
class Spent:
    """Where time went, of all profiled steps together.

    Attributes:
        wall_ns: of the host.
        compute_ns: in which kernels or operators ran.
        exposed_ns: in which an exchange was on its way and nothing was computed.
    """

    wall_ns: int = 0
    compute_ns: int = 0
    exposed_ns: int = 0

    def plus(self, other: Spent) -> Spent:
        """Both together."""
        return Spent(
            self.wall_ns + other.wall_ns, self.compute_ns + other.compute_ns, self.exposed_ns + other.exposed_ns
        )

    @property
    def own_ns(self) -> int:
        """What the rank did not spend on others."""
        return self.wall_ns - self.exposed_ns

    def per(self, steps: int) -> Spent:
        """The mean of so many steps."""
        return Spent(self.wall_ns // steps, self.compute_ns // steps, self.exposed_ns // steps)


@dataclass(frozen=True)
class AxisTime:
    """Exchanges of one axis, all of them or of one operation; times count what overlaps once.

    Attributes:
        operation: empty for all.
        exposed_ns: in which nothing was computed.
    """

    axis: str
    operation: str
    calls: int
    size_bytes: int
    time_ns: int
    exposed_ns: int


@dataclass(frozen=True)
class Kernel:
    """A kernel or operator: ``own_ns`` is without the operators that it has called."""

    name: str
    calls: int
    own_ns: int


@dataclass(frozen=True)
class Gap:
    """A stretch of a step in which nothing was computed and nothing was exchanged."""

    start_ns: int
    length_ns: int
    before: str
    behind: str
    step: str
    phase: str
    module: str


@dataclass(frozen=True)
class RankReport:
    """One rank's steps.

    Attributes:
        steps_ns: of each.
        spent: of all of them.
        phases, modules: what lies in them; modules without the modules inside of them.
    """

    rank: int
    source: str
    on_gpu: bool
    host: str
    steps_ns: dict[str, int]
    spent: Spent
    phases: dict[str, Spent]
    modules: dict[str, Spent]
    axes: list[AxisTime]
    kernels: list[Kernel]
    gaps: list[Gap]
    notes: list[str]


def analysed(trace: RankTrace, *, gaps: int = 10) -> RankReport:
    """One rank's report; ``gaps`` is how many of its gaps are kept, the longest."""
    divided = segments(trace.ranges)
    steps = {one.name: one.end - one.start for one in trace.ranges if one.kind == names.STEP}
    window = union((one.start, one.end) for one in trace.ranges if one.kind == names.STEP)
    notes = list(trace.notes)
    if not window:
        window, divided = _everything(trace)
        steps = {"": total(window)}
        notes.append("no step is marked: all that was recorded counts")
    within = [one for one in divided if one.place.step or not trace.ranges]
    computing = common(union((one.start, one.end) for one in trace.work if one.outermost), window)
    exchanging = common(union((one.start, one.end) for one in trace.exchanges), window)
    exposed = without(exchanging, computing)
    by_place = _by_place(trace, within, window, computing, exposed)
    idle = without(without(window, computing), exchanging)
    return RankReport(
        rank=trace.rank,
        source=trace.source,
        on_gpu=trace.on_gpu,
        host=trace.host,
        steps_ns=steps,
        spent=Spent(total(window), total(computing), total(exposed)),
        phases=_grouped(by_place, lambda place: place.phase),
        modules=_grouped(by_place, _module),
        axes=_axes(trace.exchanges, window, computing),
        kernels=_kernels(trace, window),
        gaps=_gaps(trace, idle, Places(within), gaps),
        notes=notes,
    )


def _everything(trace: RankTrace) -> tuple[list[Interval], list[Segment]]:
    """One stretch from the first to the last that was recorded."""
    spans = [(one.start, one.end) for one in trace.work] + [(one.start, one.end) for one in trace.exchanges]
    if not spans:
        return [], []
    whole = (min(start for start, _ in spans), max(end for _, end in spans))
    return [whole], [Segment(*whole, Place(step="all"))]


def _by_place(
    trace: RankTrace,
    divided: Sequence[Segment],
    window: Sequence[Interval],
    computing: Sequence[Interval],
    exposed: Sequence[Interval],
) -> dict[Place, Spent]:
    found: dict[Place, Spent] = defaultdict(Spent)
    for segment in divided:
        found[segment.place] = found[segment.place].plus(Spent(wall_ns=segment.end - segment.start))
    if trace.on_gpu:
        places = Places(divided)
        for one in trace.work:
            place = places.at(one.issued)
            found[place] = found[place].plus(Spent(compute_ns=one.end - one.start))
        for exchange in trace.exchanges:
            place = places.at(exchange.issued)
            alone = without([(exchange.start, exchange.end)], computing)
            found[place] = found[place].plus(Spent(exposed_ns=total(common(alone, window))))
        found.pop(NOWHERE, None)
        return found
    for place, nanoseconds in _overlap(divided, computing).items():
        found[place] = found[place].plus(Spent(compute_ns=nanoseconds))
    for place, nanoseconds in _overlap(divided, exposed).items():
        found[place] = found[place].plus(Spent(exposed_ns=nanoseconds))
    return found


def _overlap(divided: Sequence[Segment], intervals: Sequence[Interval]) -> Counter[Place]:
    """Nanoseconds of a set in each place."""
    found: Counter[Place] = Counter()
    index = 0
    for start, end, place in divided:
        while index < len(intervals) and intervals[index][1] <= start:
            index += 1
        here = index
        while here < len(intervals) and intervals[here][0] < end:
            found[place] += min(end, intervals[here][1]) - max(start, intervals[here][0])
            here += 1
    return found


def _grouped(by_place: dict[Place, Spent], name: Callable[[Place], str]) -> dict[str, Spent]:
    found: dict[str, Spent] = defaultdict(Spent)
    for place, spent in by_place.items():
        found[name(place) or OUTSIDE] = found[name(place) or OUTSIDE].plus(spent)
    return dict(found)


def _module(place: Place) -> str:
    if place.module:
        return place.module
    if place.micro_batch:
        return f"(micro-batch {place.micro_batch.rpartition(' ')[2]}, outside of modules)"
    if place.phase == names.FORWARD_BACKWARD:
        return "(between micro-batches)"
    return f"({place.phase})" if place.phase else ""


def layers_together(modules: Mapping[str, Spent]) -> dict[str, Spent]:
    """The modules of all layers as one."""
    found: dict[str, Spent] = defaultdict(Spent)
    for name, spent in modules.items():
        plain = names.without_numbers(name)
        found[plain] = found[plain].plus(spent)
    return dict(found)


def _axes(exchanges: Sequence[Exchange], window: Sequence[Interval], computing: Sequence[Interval]) -> list[AxisTime]:
    """The axes in the order of what is exposed, each followed by its operations."""
    rows: dict[tuple[str, str], list[Exchange]] = defaultdict(list)
    for one in exchanges:
        if common([(one.start, one.end)], window):
            rows[one.axis, ""].append(one)
            rows[one.axis, one.operation].append(one)
    found = {}
    for (axis, operation), row in rows.items():
        covered = common(union((one.start, one.end) for one in row), window)
        alone = total(without(covered, computing))
        found[axis, operation] = AxisTime(
            axis, operation, len(row), sum(one.size for one in row), total(covered), alone
        )
    return sorted(
        found.values(),
        key=lambda one: (-found[one.axis, ""].exposed_ns, one.axis, one.operation != "", -one.exposed_ns),
    )


def _kernels(trace: RankTrace, window: Sequence[Interval]) -> list[Kernel]:
    first, last = (window[0][0], window[-1][1]) if window else (0, 0)
    calls: Counter[str] = Counter()
    own: Counter[str] = Counter()
    for one in trace.work:
        if first <= one.start < last:
            calls[one.name] += 1
            own[one.name] += one.own
    return [Kernel(name, calls[name], nanoseconds) for name, nanoseconds in own.most_common()]


def _gaps(trace: RankTrace, idle: Sequence[Interval], places: Places, kept: int) -> list[Gap]:
    longest = sorted(sorted(idle, key=lambda gap: gap[0] - gap[1])[:kept])
    if not longest:
        return []
    happened = sorted(_happened(trace))
    ends = sorted((end, name) for _, end, name in happened)
    found = []
    at = behind = 0
    for start, end in longest:
        while at < len(ends) and ends[at][0] <= start:
            at += 1
        while behind < len(happened) and happened[behind][0] < end:
            behind += 1
        place = places.at((start + end) // 2)  # it began within what came before
        before = ends[at - 1][1] if at else ""
        after = happened[behind][2] if behind < len(happened) else ""
        found.append(Gap(start, end - start, before, after, place.step, place.phase, place.module))
    return sorted(found, key=lambda gap: -gap.length_ns)


def _happened(trace: RankTrace) -> Iterable[tuple[int, int, str]]:
    for work in trace.work:
        if work.outermost:
            yield work.start, work.end, work.name
    for exchange in trace.exchanges:
        yield exchange.start, exchange.end, f"{exchange.operation} {exchange.axis}"
