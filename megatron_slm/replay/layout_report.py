"""The verdict on two runs of different layouts, in words and as JSON. No torch."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from megatron_slm.replay.global_names import module_of

LOSS = "loss"
UPDATES = 4.0
"""Two runs whose gradients differ throughout part by about twice what each has moved its weights."""


class Deviation(NamedTuple):
    """Something that differs by more than rounding does: a step's number, or a tensor after a step."""

    step: int
    name: str
    error: float
    """Relative."""
    tolerance: float

    @property
    def ratio(self) -> float:
        """The error in units of the tolerance; 0 where rounding alone leaves nothing to compare."""
        return self.error / self.tolerance if math.isfinite(self.tolerance) else 0.0

    @property
    def module(self) -> str:
        """The module that a tensor belongs to."""
        return module_of(self.name)

    def record(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        fields = {**self._asdict(), "ratio": self.ratio, "module": self.module}
        return {key: str(value) if value == math.inf else value for key, value in fields.items()}


class Origin(NamedTuple):
    """Where a run computes something else than one rank does, found by making its first steps again.

    Attributes:
        what: it differs in: "copies" of a weight, "weights", "forward", "loss", "backward", "gradient".
        run: 0 or 1, of the two that are compared.
        repeated: whether it has come to the loss that the run has logged.
    """

    step: int
    module: str
    what: str
    detail: str = ""
    run: int = 0
    repeated: bool = True


@dataclass(frozen=True)
class LayoutDifference:
    """What two runs have not in common, beside their layouts.

    Attributes:
        layouts: of both, in words.
        steps: completed steps of the checkpoints that both have, oldest first.
        settings: what their configurations have not in common, beside the layout.
        samples: the first step in which other samples were read; nothing else is compared then.
        numbers: the first loss and the first gradient norm that deviate.
        tensors: those that deviate in the first checkpoint in which one does, in the order of the model.
        displaced: weights among them that are farther apart than updates have moved them since the start; each with
            ``UPDATES`` times that way as its tolerance.
        compared: tensors of a checkpoint.
        largest: the largest error in units of its tolerance in the newest checkpoint.
        looked: whether the first steps were made again to find where it comes from.
        origins: where.
    """

    layouts: tuple[str, str]
    steps: tuple[int, ...]
    settings: tuple[str, ...] = ()
    samples: int | None = None
    numbers: tuple[Deviation, ...] = ()
    tensors: tuple[Deviation, ...] = ()
    displaced: tuple[Deviation, ...] = ()
    compared: int = 0
    largest: float = 0.0
    looked: bool = False
    origins: tuple[Origin, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether all is within its tolerance."""
        return self.samples is None and not self.numbers and not self.tensors

    @property
    def worst(self) -> Deviation | None:
        """The tensor that is farthest beyond its tolerance; of equals, the first in the model.

        A weight that no update has brought there comes before all others: it was wrong before they were.
        """
        return max(self.displaced or self.tensors, key=lambda one: one.ratio, default=None)

    @property
    def loss_parted(self) -> int | None:
        """The first step whose loss deviates."""
        return next((one.step for one in self.numbers if one.name == LOSS), None)

    def render(self) -> str:
        """The verdict in words."""
        return "\n".join([*self._verdict(), *(f"  although other: {fact}" for fact in self.settings)])

    def _verdict(self) -> list[str]:
        between = f"{self.layouts[0]} against {self.layouts[1]}"
        if self.samples is not None:
            return [
                f"DIFFERENT: {between}",
                f"  data           other samples from step {self.samples} on; no more compared",
            ]
        if self.equal:
            return [
                f"equal within tolerance: {between}; losses and gradient norms of steps 1 to {self.steps[-1]}, "
                f"{self.compared} tensors after it, the farthest at {self.largest:.2g} of its tolerance"
            ]
        lines = [f"DIFFERENT: {between}", *self._origin()]
        lines += [f"  {one.name:<14} of step {one.step}: {_beyond(one)}" for one in self.numbers]
        if (worst := self.worst) is None:
            return [*lines, f"  tensors        after step {self.steps[-1]} within tolerance"]
        first = self.tensors[0]
        return [
            *lines,
            f"  {'displaced' if self.displaced else 'most deviating':<14} {worst.name} after step {worst.step}: "
            + (f"{worst.ratio:.3g} x {_DISPLACED}" if self.displaced else _beyond(worst)),
            f"  its module     {worst.module}",
            f"  first in model {first.name}: {_beyond(first)}",
            f"  tensors        {len(self.tensors)} of {self.compared} deviate after step {worst.step}",
            *([] if self.origins else [f"  loss           {_of_loss(self.loss_parted)}"]),
        ]

    def _origin(self) -> list[str]:
        """Where it comes from."""
        if not self.looked:
            return []
        lines = []
        for one in self.origins:
            lines.append(f"  origin         {self.layouts[one.run]}, step {one.step}: {one.module} ({one.what})")
            lines += [f"                 {one.detail}"] if one.detail else []
            lines += [] if one.repeated else [f"                 {_NOT_REPEATED}"]
        return lines or ["  origin         in neither run's first steps, which are within tolerance of one rank's"]

    def to_json(self) -> str:
        """The same as one JSON line."""
        record = asdict(self) | {
            "equal": self.equal,
            "loss_parted": self.loss_parted,
            "numbers": [one.record() for one in self.numbers],
            "worst": self.worst.record() if self.worst else None,
            "tensors": [one.record() for one in self.tensors],
            "displaced": [one.record() for one in self.displaced],
            "origins": [one._asdict() for one in self.origins],
            "largest": self.largest if math.isfinite(self.largest) else str(self.largest),
        }
        return json.dumps(record)


_DISPLACED = f"{UPDATES:g} times what all updates have moved it by: it was other from the start"


_NOT_REPEATED = "made again, its first loss is not the one it has logged: code or machine have changed since"


def _of_loss(step: int | None) -> str:
    """What the step in which the loss has parted says."""
    if step == 1:
        return "parts in step 1: the weights that both begin with, or the forward pass"
    when = "does not part" if step is None else f"parts in step {step}, not before"
    return f"{when}: the forward pass seems right; look at gradients, their reduction and the optimizer"


def _beyond(one: Deviation) -> str:
    return f"{one.ratio:.3g} x its tolerance ({one.error:.2g} against {one.tolerance:.2g}, relative)"
