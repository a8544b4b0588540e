"""A profile's report as text. No torch."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from megatron_slm.profile.analyse import Gap, RankReport, Spent, layers_together
from megatron_slm.profile.compare import Report
from megatron_slm.profile.names import PHASES

_NAME_WIDTH = 60


def text_of(report: Report, *, top: int = 10, layers: bool = False) -> str:
    """Every table; ``top`` rows of modules, kernels and gaps, or with ``layers`` every module of every layer."""
    ranks = report.ranks
    by_module = [dict(one.modules) if layers else layers_together(one.modules) for one in ranks]
    modules = _means(ranks, by_module)
    shown = _longest(modules, len(modules) if layers else top)
    parts = [
        _heading(ranks),
        _spent_table("phase", _phases_first(_means(ranks, [one.phases for one in ranks])), ranks),
        _spent_table("module" if layers else "module, layers together", shown, ranks),
        _axes_table(ranks),
        _kernels_table(ranks, top),
        _gaps_table(ranks, top),
        _ranks_table(report),
    ]
    notes = [f"note: {one.source}: {note}" for one in ranks for note in one.notes]
    return "\n\n".join(filter(None, [*parts, "\n".join(notes)]))


def _heading(ranks: Sequence[RankReport]) -> str:
    steps = max(len(one.steps_ns) for one in ranks)
    names = [name for name in ranks[0].steps_ns if name]
    which = f"step{'s' * (steps > 1)} {', '.join(names)}" if names else "no marked step"
    seen = "kernels of the GPU" if ranks[0].on_gpu else "operators of CPU ranks: nothing here is of a GPU"
    return (
        f"{len(ranks)} rank{'s' * (len(ranks) > 1)}, {which}; {seen}\n"
        "all times are ms of one step, the mean of its steps and, unless a rank is named, of the ranks"
    )


def _means(ranks: Sequence[RankReport], tables: Sequence[Mapping[str, Spent]]) -> dict[str, Spent]:
    """Per step, the mean of the ranks."""
    found: dict[str, Spent] = defaultdict(Spent)
    for rank, table in zip(ranks, tables, strict=True):
        for name, spent in table.items():
            found[name] = found[name].plus(spent.per(max(1, len(rank.steps_ns))))
    return {name: spent.per(len(ranks)) for name, spent in found.items()}


def _phases_first(table: Mapping[str, Spent]) -> dict[str, Spent]:
    known = [name for name in PHASES if name in table]
    return {name: table[name] for name in (*known, *(name for name in table if name not in known))}


def _longest(table: Mapping[str, Spent], top: int) -> dict[str, Spent]:
    names = sorted(table, key=lambda name: -max(table[name].wall_ns, table[name].compute_ns))
    return {name: table[name] for name in names[:top]}


def _spent_table(title: str, table: Mapping[str, Spent], ranks: Sequence[RankReport]) -> str:
    on_gpu = ranks[0].on_gpu
    whole = sum(one.spent.per(max(1, len(one.steps_ns))).wall_ns for one in ranks) // len(ranks)
    last = "" if on_gpu else f"{'host':>10}"
    lines = [f"{title:<{_NAME_WIDTH}}{'wall':>10}{'share':>8}{'compute':>10}{'exposed':>10}{last}"]
    for name, spent in table.items():
        host = "" if on_gpu else _ms(spent.wall_ns - spent.compute_ns - spent.exposed_ns)
        share = f"{spent.wall_ns / whole:>8.1%}" if whole else f"{'-':>8}"
        lines.append(
            f"{_short(name):<{_NAME_WIDTH}}{_ms(spent.wall_ns)}{share}{_ms(spent.compute_ns)}{_ms(spent.exposed_ns)}{host}"
        )
    return "\n".join(lines)


def _axes_table(ranks: Sequence[RankReport]) -> str:
    rows: dict[tuple[str, str], list[float]] = {}
    for rank in ranks:
        steps = max(1, len(rank.steps_ns)) * len(ranks)
        for one in rank.axes:
            row = rows.setdefault((one.axis, one.operation), [0.0] * 4)
            for index, value in enumerate((one.calls, one.size_bytes, one.time_ns, one.exposed_ns)):
                row[index] += value / steps
    if not rows:
        return "communication: none"
    axes = sorted({axis for axis, _ in rows}, key=lambda axis: -rows[axis, ""][3])
    lines = [f"{'communication':<{_NAME_WIDTH - 10}}{'calls':>10}{'MB':>10}{'time':>10}{'exposed':>10}{'hidden':>8}"]
    for axis in axes:
        own = sorted((row for row in rows if row[0] == axis), key=lambda row: (row[1] != "", -rows[row][3]))
        for name in own:
            calls, size, time, exposed = rows[name]
            hidden = f"{1 - exposed / time:>8.0%}" if time else f"{'-':>8}"
            label = f"  {name[1]}" if name[1] else axis
            lines.append(
                f"{label:<{_NAME_WIDTH - 10}}{calls:>10.1f}{size / 1e6:>10.3f}{_ms(time)}{_ms(exposed)}{hidden}"
            )
    return "\n".join(lines)


def _kernels_table(ranks: Sequence[RankReport], top: int) -> str:
    rows: dict[str, list[float]] = {}
    for rank in ranks:
        steps = max(1, len(rank.steps_ns)) * len(ranks)
        for one in rank.kernels:
            row = rows.setdefault(_plain_kernel(one.name), [0.0, 0.0])
            row[0] += one.calls / steps
            row[1] += one.own_ns / steps
    names = sorted(rows, key=lambda name: -rows[name][1])[:top]
    title = "kernel" if ranks[0].on_gpu else "operator, without those it calls"
    lines = [f"{title:<{_NAME_WIDTH}}{'calls':>10}{'own':>10}"]
    lines += [f"{_short(name):<{_NAME_WIDTH}}{rows[name][0]:>10.1f}{_ms(rows[name][1])}" for name in names]
    return "\n".join(lines)


def _gaps_table(ranks: Sequence[RankReport], top: int) -> str:
    gaps = [(one.rank, gap) for one in ranks for gap in one.gaps]
    gaps.sort(key=lambda pair: -pair[1].length_ns)
    lines = [f"{'longest idle gaps, of one step each':<{_NAME_WIDTH}}{'ms':>10}  between"]
    for rank, gap in gaps[:top]:
        where = f"rank {rank}, step {gap.step}, {_where(gap)}"
        lines.append(
            f"{_short(where):<{_NAME_WIDTH}}{_ms(gap.length_ns)}  {_plain_kernel(gap.before) or 'the start'} and "
            f"{_plain_kernel(gap.behind) or 'the end'}"
        )
    return "\n".join(lines) if gaps else ""


def _where(gap: Gap) -> str:
    return gap.module or gap.phase or "between"


def _ranks_table(report: Report) -> str:
    lines = [f"{'rank':<12}{'step':>10}{'own':>10}{'compute':>10}{'waiting':>10}{'host':>10}  machine"]
    for rank in report.ranks:
        spent = rank.spent.per(max(1, len(rank.steps_ns)))
        host = spent.wall_ns - spent.compute_ns - spent.exposed_ns
        lines.append(
            f"{rank.rank:<12}{_ms(spent.wall_ns)}{_ms(spent.own_ns)}{_ms(spent.compute_ns)}{_ms(spent.exposed_ns)}"
            f"{_ms(host)}  {rank.host}"
        )
    if (found := report.slowest) is not None:
        percent = (found.own_ns / found.others_ns - 1) if found.others_ns else 0.0
        lines.append(
            f"slowest: rank {found.rank}, {_ms(found.own_ns).strip()} ms of its own in a step, {percent:.0%} more than "
            f"the median of the others; most of it in {found.where} ({_ms(found.more_ns).strip()} ms more)"
        )
    return "\n".join(lines)


def _plain_kernel(name: str) -> str:
    """A kernel without the arguments of its templates and of itself, which are what differs least."""
    return re.sub(r"<.*|\(.*", "", name.removeprefix("void ")).strip() or name


def _short(name: str) -> str:
    return name if len(name) < _NAME_WIDTH else f"{name[: _NAME_WIDTH - 5]} ..."


def _ms(nanoseconds: float) -> str:
    return f"{nanoseconds / 1e6:>10.3f}"
