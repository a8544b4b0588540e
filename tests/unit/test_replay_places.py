"""Where an operation was called: by a line of source, or by the gradient of one."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_slm.errors import CheckpointError
from megatron_slm.replay import places
from megatron_slm.replay.bisect import made_at
from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.diff import Divergence, Key
from megatron_slm.replay.operations import NOWHERE, Operations
from megatron_slm.replay.places import Place
from megatron_slm.replay.show import step_text
from megatron_slm.replay.stream import Phase, StreamWriter, records_of

HERE = "tests/unit/test_replay_places.py"


class Doubled(torch.autograd.Function):
    """Has a backward pass of Python lines."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x + x

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 2


def squared(x: Tensor) -> Tensor:
    return torch.nn.functional.mse_loss(x, torch.zeros_like(x), reduction="sum")


def recorded(folder: Path, weight: Tensor) -> list[tuple[str, Place]]:
    """Every operation of a small forward and backward pass, with its place."""
    noted: list[str] = []

    def note(name: str, tensors: list[Tensor]) -> bool:
        noted.extend([name] * len(tensors))
        return True

    file = places.path_of(folder, 3, 1)
    with Operations(note, file):
        squared(Doubled.apply(weight).exp()).backward()
    return list(zip(noted, places.read(file), strict=True))


def line_of(function: object, text: str) -> int:
    lines, start = inspect.getsourcelines(function)  # type: ignore[arg-type]
    return start + next(index for index, line in enumerate(lines) if text in line)


def test_forward_lines_are_ours_not_torchs(tmp_path: Path) -> None:
    found = recorded(tmp_path, torch.ones(3, requires_grad=True))
    forward = dict(found[::-1])  # the first of each name
    assert forward["aten.mse_loss.default"] == Place(
        HERE, line_of(squared, "mse_loss"), "squared", inspect.getsource(squared).splitlines()[1].strip()
    )
    assert forward["aten.add.Tensor"].line == line_of(Doubled.forward, "x + x")
    assert str(forward["aten.exp.default"]) == f"{HERE}:{line_of(recorded, '.exp()')} in recorded"


def test_a_gradient_has_the_line_whose_gradient_it_is(tmp_path: Path) -> None:
    found = recorded(tmp_path, torch.ones(3, requires_grad=True))
    loss_gradient = next(place for name, place in found if name == "aten.mse_loss_backward.default")
    assert loss_gradient.backward and loss_gradient.function == "squared"
    assert str(loss_gradient).startswith(f"the gradient of {HERE}:")
    own = next(place for name, place in found if name == "aten.mul.Tensor" and not place.backward)
    assert own.function == "backward" and own.line == line_of(Doubled.backward, "gradient * 2")
    exponential = next(place for name, place in found if name == "aten.mul.Tensor" and place.backward)
    assert exponential.line == line_of(recorded, ".exp()")
    assert NOWHERE not in dict(found).values()


def test_places_come_back_as_written_or_say_what_is_wrong(tmp_path: Path) -> None:
    table = [Place("a.py", 1, "f", "x = 1"), Place("b.py", 2, "g", "", backward=True)]
    file = places.path_of(tmp_path, 7, 2)
    assert places.read(file) == []
    places.write(file, table, [1, 0, 1])
    assert places.read(file) == [table[1], table[0], table[1]]
    file.write_text('{"table": [], "records": [4]}')
    with pytest.raises(CheckpointError, match="is damaged"):
        places.read(file)


def capsule_with(folder: Path, calls: list[tuple[str, int]], *, table: bool = True) -> Capsule:
    """A step whose operations are called by the given names, on the given lines."""
    writer = StreamWriter(folder, 0, step=0)
    entries = [(int(Phase.OPERATION), 0, writer.number(f"{name}[0] float32[2]")) for name, _ in calls]
    writer.write(1, records_of(entries, np.arange(2 * len(calls), dtype=np.uint64).reshape(-1, 2)))
    writer.close()
    if table:
        known = [Place("model.py", line, "forward", f"line {line}") for _, line in calls]
        places.write(places.path_of(folder, 1, 0), known, range(len(known)))
    return Capsule(folder)


def parted(name: str, nth: int, only_in: str | None = None) -> Divergence:
    return Divergence(1, False, 0, Key(Phase.OPERATION, 0, f"{name}[0] float32[2]", nth), 0, 0, 1, only_in)


def test_each_run_shows_its_own_line(tmp_path: Path) -> None:
    one = capsule_with(tmp_path / "one", [("aten.mm", 3), ("aten.exp", 4), ("aten.exp", 6)])
    other = capsule_with(tmp_path / "other", [("aten.mm", 3), ("aten.exp", 5), ("aten.clamp", 6), ("aten.exp", 6)])
    assert made_at(one, other, parted("aten.mm", 0)) == ("model.py:3 in forward", "  line 3")
    assert made_at(one, other, parted("aten.exp", 0))[::2] == (
        "first run: model.py:4 in forward",
        "second run: model.py:5 in forward",
    )
    alone = made_at(one, other, parted("aten.clamp", 0, "second"))
    assert alone == ("model.py:6 in forward", "  line 6"), "against it stands what comes behind the common call before"
    assert made_at(other, one, parted("aten.clamp", 0, "first")) == alone


def test_without_places_there_is_nothing_to_say(tmp_path: Path) -> None:
    old = capsule_with(tmp_path / "old", [("aten.mm", 3)], table=False)
    assert made_at(old, old, parted("aten.mm", 0)) == ()
    assert "aten.mm[0]" in step_text(old, 1, 0)


def test_show_says_where_each_operation_was_called(tmp_path: Path) -> None:
    text = step_text(capsule_with(tmp_path / "replay", [("aten.mm", 3), ("aten.exp", 4)]), 1, 0)
    assert [line.split()[-3] for line in text.splitlines() if "aten." in line] == ["model.py:3", "model.py:4"]
