"""Where a thread stands: in an exchange with other ranks, or in a line of its own. Read from its Python stack.

Nothing is recorded while a run goes well: a collective blocks inside C++ without the interpreter's lock, so that
another thread can look at the frames that called it, and at the group that was handed in.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch.distributed as dist

_TORCH_EXCHANGES = os.path.dirname(dist.distributed_c10d.__file__) + os.sep
_WAIT = ".wait()"
_GROUPS_OF_FRAMES = 8
"""So many callers up, somebody knows the group of an exchange that is waited for."""

Known = dict[tuple[CodeType, int], bool]
"""Whether a line of code is one in which ranks wait for each other."""


@dataclass(frozen=True)
class Place:
    """Where a thread stands.

    Attributes:
        operation: the exchange as its caller names it, such as "all_reduce"; empty outside of one.
        ranks: of the exchange, in the world's numbers; empty where its caller does not say.
        line: file, line and function of whoever asked for the exchange, or of what runs.
    """

    operation: str
    ranks: tuple[int, ...]
    line: str

    @property
    def exchanging(self) -> bool:
        """Whether the thread waits for other ranks."""
        return bool(self.operation)


def waits(frame: FrameType, known: Known) -> bool:
    """Whether a thread with this innermost frame waits for other ranks. Costs microseconds.

    Args:
        known: filled as lines are met.
    """
    line = (frame.f_code, frame.f_lineno)
    if line not in known:
        known[line] = _in_torch(frame) or _waits_for_work(frame)
    return known[line]


def place_of(frame: FrameType) -> Place:
    """Where the thread with this innermost frame stands."""
    stack = list(_outwards(frame))
    inside = [one for one in stack if _in_torch(one)]
    if inside and _in_torch(stack[0]):
        callers = stack[_first_outside(stack) :]
        call = [one for one in inside[: _first_outside(stack)] if one.f_code.co_filename == _C10D]
        asked = call[-1] if call else inside[0]
        return Place(asked.f_code.co_name, _ranks([asked, *callers]), _line(callers[0] if callers else asked))
    if _waits_for_work(frame):
        named = next((one for one in stack if not one.f_code.co_name.startswith(("_", "<"))), frame)
        return Place(named.f_code.co_name, _neighbours(stack, named) or _ranks(stack), _line(frame))
    return Place("", (), _line(next((one for one in stack if not _in_python(one)), frame)))


_C10D = dist.distributed_c10d.__file__
_PYTHON = os.path.dirname(os.__file__) + os.sep
_SITE = os.sep + "site-packages" + os.sep


def _outwards(frame: FrameType) -> Iterator[FrameType]:
    found: FrameType | None = frame
    while found is not None:
        yield found
        found = found.f_back


def _in_torch(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_TORCH_EXCHANGES)


def _in_python(frame: FrameType) -> bool:
    """In the standard library, where nobody looks for the reason."""
    name = frame.f_code.co_filename
    return name.startswith("<") or (name.startswith(_PYTHON) and _SITE not in name)


def _first_outside(stack: list[FrameType]) -> int:
    """Where, from the innermost frame outwards, torch's own frames end."""
    return next((index for index, one in enumerate(stack) if not _in_torch(one)), len(stack))


def _waits_for_work(frame: FrameType) -> bool:
    """Whether the line waits for an exchange that was started before."""
    name = frame.f_code.co_filename
    return not _in_python(frame) and _WAIT in _source_line(name, frame.f_lineno)


def _source_line(name: str, number: int) -> str:
    """A line of a source file; empty where there is none. ``linecache`` is not for two threads at once."""
    try:
        with open(name, encoding="utf-8", errors="replace") as source:
            return next(itertools.islice(source, number - 1, number), "")
    except OSError:
        return ""


def _ranks(stack: list[FrameType]) -> tuple[int, ...]:
    """Ranks of the first group that the frames know."""
    for frame in stack[:_GROUPS_OF_FRAMES]:
        own = frame.f_locals
        for values in (own, _attributes(own.get("self")), _attributes(own.get("ctx"))):
            group = next((value for value in values.values() if isinstance(value, dist.ProcessGroup)), None)
            if group is not None:
                return tuple(dist.get_process_group_ranks(group))
        if frame.f_code.co_filename == _C10D and own.get("group", frame) is None:
            return tuple(range(dist.get_world_size()))
    return ()


def _neighbours(stack: list[FrameType], named: FrameType) -> tuple[int, ...]:
    """The neighbours that core's pipeline waits for, by the name of what it does."""
    own = _attributes(named.f_locals.get("self"))
    if not {"prev_rank", "next_rank"} <= own.keys():
        return ()
    name = named.f_code.co_name
    before = "recv_forward" in name or "send_backward" in name
    behind = "recv_backward" in name or "send_forward" in name
    return tuple({own[key]: None for key, asked in (("prev_rank", before), ("next_rank", behind)) if asked})


def _attributes(value: Any) -> Mapping[str, Any]:
    return getattr(value, "__dict__", {}) if value is not None else {}


def _line(frame: FrameType) -> str:
    """Such as ``train/step.py:128 in train_step``: the last two parts of the path say enough."""
    parts = frame.f_code.co_filename.split(os.sep)[-2:]
    return f"{'/'.join(parts)}:{frame.f_lineno} in {frame.f_code.co_name}"


def group_name(ranks: tuple[int, ...], axes: Mapping[tuple[int, ...], str]) -> str:
    """Such as ``tp [2, 3]``.

    Args:
        axes: name of the group of ranks.
    """
    numbers = ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]} ... {ranks[-1]}, {len(ranks)} ranks"
    name = axes.get(ranks)
    if not ranks:
        return "ranks that its caller does not name"
    return f"{name} [{numbers}]" if name else f"rank{'s' * (len(ranks) > 1)} [{numbers}]"
