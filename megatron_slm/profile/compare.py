"""Ranks beside each other: who is busy, who waits, who is waited for. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from megatron_slm.errors import DataError
from megatron_slm.profile.analyse import OUTSIDE, RankReport, Spent, analysed, layers_together
from megatron_slm.profile.chrome import read_chrome
from megatron_slm.profile.nsight import is_sqlite, read_nsight

FOLDER = "profile"
_PATTERNS = ("rank-*.sqlite", "rank-*.json.gz", "rank-*.json")


@dataclass(frozen=True)
class Slowest:
    """The rank that spends most of a step on itself, while the others wait for it.

    Attributes:
        own_ns: of a step, outside of exposed communication.
        others_ns: the same, the median of the other ranks.
        where: the phase or module in which it differs most from them.
        more_ns: by so much.
    """

    rank: int
    own_ns: int
    others_ns: int
    where: str
    more_ns: int


@dataclass(frozen=True)
class Report:
    """All ranks; ``slowest`` is None where there is but one."""

    ranks: list[RankReport]
    slowest: Slowest | None

    def to_json(self) -> str:
        """Every number of it."""
        return json.dumps(asdict(self), indent=1)


def traces_of(given: Sequence[Path]) -> list[Path]:
    """The files to read: those given, or of a run's directory its profiles.

    Raises:
        DataError: there is no such file, or no profile in a directory.
    """
    found: list[Path] = []
    for path in given:
        if not path.is_dir():
            if not path.is_file():
                raise DataError(f"{path} does not exist. Give traces of ranks, or the directory of a profiled run.")
            found.append(path)
            continue
        folder = path / FOLDER if (path / FOLDER).is_dir() else path
        own = next((files for pattern in _PATTERNS if (files := sorted(folder.glob(pattern)))), [])
        if not own:
            captured = sorted(folder.glob("rank-*.nsys-rep"))
            way_out = (
                f"nsys export --type sqlite {captured[0]} makes one."
                if captured
                else f"mslm profile CONFIG --steps 10:12 makes them; {path}-profile may be the run that it has made."
            )
            raise DataError(f"{folder} holds no rank-N.json.gz and no rank-N.sqlite. {way_out}")
        found += own
    return found


def report_of(paths: Sequence[Path], *, gaps: int = 10) -> Report:
    """Read one trace a rank, and compare.

    Raises:
        DataError: a file is neither a Chrome trace nor an SQLite export, or two are of one rank.
    """
    ranks = [analysed(read_nsight(path) if is_sqlite(path) else read_chrome(path), gaps=gaps) for path in paths]
    ranks.sort(key=lambda one: one.rank)
    for one, other in zip(ranks, ranks[1:], strict=False):
        if one.rank == other.rank:
            raise DataError(
                f"{one.source} and {other.source} are both of rank {one.rank}. Give the files of one profile, one a "
                "rank."
            )
    return Report(ranks, slowest(ranks))


def slowest(ranks: Sequence[RankReport]) -> Slowest | None:
    """Who is waited for."""
    if len(ranks) < 2:
        return None
    own = [_per_step(one, one.spent).own_ns for one in ranks]
    index = max(range(len(ranks)), key=own.__getitem__)
    others = [one for other, one in enumerate(ranks) if other != index]
    usual = round(median(own[other] for other in range(len(ranks)) if other != index))
    usual_of = [_own_by_module(one) for one in others]
    excess = {
        name: own_ns - round(median(one.get(name, 0) for one in usual_of))
        for name, own_ns in _own_by_module(ranks[index]).items()
    }
    where = max(excess, key=excess.__getitem__) if excess else ""
    return Slowest(ranks[index].rank, own[index], usual, where, excess.get(where, 0))


def _own_by_module(rank: RankReport) -> dict[str, int]:
    table = layers_together(rank.modules)
    return {name: _per_step(rank, spent).own_ns for name, spent in table.items() if name != OUTSIDE}


def _per_step(rank: RankReport, spent: Spent) -> Spent:
    return spent.per(max(1, len(rank.steps_ns)))
