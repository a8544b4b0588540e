"""The records of one step on their way into the stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_slm.replay.fingerprint import Bound, Sheet
from megatron_slm.replay.stream import Phase, StreamWriter, records_of
from megatron_slm.replay.tensors import Named

Lanes = tuple[int, int]
SOON_BYTES = 8 << 20
"""Of activations and their gradients that may be held a little longer than the model holds them."""


class Soon(NamedTuple):
    """A tensor that is to be taken in; ``version`` is its count of changes in place when it was met."""

    phase: Phase
    micro_batch: int
    name: str
    tensor: Tensor
    version: int

    def told_name(self) -> str:
        """Its name, which says so if it was changed since."""
        return self.name if self.tensor._version == self.version else f"{self.name} (overwritten)"


class Page:
    """The records of one step, until they are written.

    Attributes:
        open: whether a step is being recorded.
        busy: whether digests are being computed: operations that are not the step's.
    """

    def __init__(self) -> None:
        """Empty."""
        self.open = self.busy = False
        self._soon: list[Soon] = []
        self._soon_bytes = 0
        self._sheets: dict[torch.device, Sheet] = {}
        self._entries: list[tuple[Phase, int, str]] = []
        self._sources: list[tuple[torch.device | None, int]] = []
        self._values: list[Lanes] = []
        self._held: dict[int, tuple[Named, list[tuple[torch.device, Bound, list[str]]] | None]] = {}
        self._texts: dict[tuple[str, torch.dtype, torch.Size], str] = {}

    def note_soon(self, phase: Phase, micro_batch: int, names: list[str], tensors: Sequence[Tensor]) -> None:
        """Take tensors in together with those that follow, up to ``SOON_BYTES``: before anything else, at the latest.

        Between two matrix products no code and no data of ours is in the processor's caches, and a small digest on its
        own costs ten times what it costs among others.
        """
        for name, tensor in zip(names, tensors, strict=True):
            self._soon.append(Soon(phase, micro_batch, name, tensor, tensor._version))
            self._soon_bytes += tensor.numel() * tensor.element_size()
        if self._soon_bytes > SOON_BYTES:
            self.note_now()

    def note_now(self) -> None:
        """Take in what was to be taken in soon; a tensor under several names is read once."""
        if not self._soon:
            return
        soon, self._soon, self._soon_bytes = self._soon, [], 0
        for device in dict.fromkeys(one.tensor.device for one in soon):
            own = [one for one in soon if one.tensor.device == device]
            distinct = {_place(one.tensor): one.tensor for one in own}
            with self._alone():
                places = dict(zip(distinct, self._sheet(device).add(list(distinct.values())), strict=True))
            self._sources += [(device, places[_place(one.tensor)]) for one in own]
            self._entries += [(one.phase, one.micro_batch, self._text(one.told_name(), one.tensor)) for one in own]

    def note(self, phase: Phase, micro_batch: int, names: list[str], tensors: Sequence[Tensor]) -> None:
        """Take tensors in, as they are now."""
        self.note_now()
        with self._alone():
            for device in dict.fromkeys(tensor.device for tensor in tensors):
                chosen = [index for index, tensor in enumerate(tensors) if tensor.device == device]
                own = [tensors[index] for index in chosen]
                places = self._sheet(device).add(own)
                self._sources += [(device, place) for place in places]
                self._entries += [
                    (phase, micro_batch, self._text(names[index], tensor))
                    for index, tensor in zip(chosen, own, strict=True)
                ]

    def note_held(self, phase: Phase, named: Named) -> None:
        """Take in tensors that stay where they are, as they are now; what ``forget_held`` ends."""
        found = self._held.get(id(named))
        if found is None:
            found = self._held.setdefault(id(named), (named, self._prepared(named)))
        _, prepared = found
        if prepared is None:
            self.note(phase, 0, named.names, named.tensors)
            return
        self.note_now()
        with self._alone():
            for device, bound, texts in prepared:
                self._sources += [(device, place) for place in self._sheet(device).add_bound(bound)]
                self._entries += [(phase, 0, text) for text in texts]

    def forget_held(self) -> None:
        """The tensors of ``note_held`` are others from now on."""
        self._held.clear()

    def _prepared(self, named: Named) -> list[tuple[torch.device, Bound, list[str]]] | None:
        """By device, tensors that can be read where they are; None where one cannot."""
        prepared = []
        for device in dict.fromkeys(tensor.device for tensor in named.tensors):
            own = [(name, tensor) for name, tensor in zip(*named, strict=True) if tensor.device == device]
            bound = self._sheet(device).bind([tensor for _, tensor in own])
            if bound is None:
                return None
            prepared.append((device, bound, [self._text(name, tensor) for name, tensor in own]))
        return prepared

    def note_value(self, phase: Phase, name: str, lanes: Lanes) -> None:
        """Take in 128 bits that the host knows."""
        self.note_now()
        self._entries.append((phase, 0, name))
        self._sources.append((None, len(self._values)))
        self._values.append(lanes)

    def write(self, writer: StreamWriter, step: int, flags: int) -> None:
        """Fetch the digests and append the step; the page is empty again."""
        self.note_now()
        found: dict[torch.device | None, Any] = {device: sheet.finish() for device, sheet in self._sheets.items()}
        found[None] = np.array(self._values, dtype=np.uint64).reshape(-1, 2)
        lanes = np.zeros((len(self._sources), 2), dtype=np.uint64)
        devices = np.array([list(found).index(device) for device, _ in self._sources])
        places = np.array([place for _, place in self._sources])
        for number, values in enumerate(found.values()):
            lanes[devices == number] = values[places[devices == number]]
        entries = [(phase, micro_batch, writer.number(name)) for phase, micro_batch, name in self._entries]
        writer.write(step, records_of(entries, lanes), flags)
        self.clear()

    def clear(self) -> None:
        """Forget the step."""
        self.open = False
        self._soon, self._soon_bytes = [], 0
        self._entries, self._sources, self._values = [], [], []
        for sheet in self._sheets.values():
            sheet.clear()

    def _sheet(self, device: torch.device) -> Sheet:
        found = self._sheets.get(device)
        if found is None:
            found = self._sheets[device] = Sheet()
        return found

    def _text(self, name: str, tensor: Tensor) -> str:
        """Name, dtype and shape, as the names' file has them."""
        key = (name, tensor.dtype, tensor.shape)
        text = self._texts.get(key)
        if text is None:
            dtype = str(tensor.dtype).removeprefix("torch.")
            text = self._texts[key] = f"{name} {dtype}[{','.join(map(str, tensor.shape))}]"
        return text

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """What is computed here is no operation of the step."""
        before, self.busy = self.busy, True
        try:
            yield
        finally:
            self.busy = before


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors that are alive share only if they are the same numbers."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
