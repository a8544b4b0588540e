"""Digests of tensors: 128 bits of every tensor's bytes, computed where the tensor is.

A tree of exact matrix products, the same on every device and for every number of threads:

    bytes     the elements in row-major order, whatever the strides, padded with zeros to rows of 1,024 bytes
    level 1   each row times a key of 1,024 x 8 fixed random bytes: eight int32, 32 bytes
    level 2   the 32-byte results of 32 rows are a row of 1,024 bytes, multiplied by a second key
    lanes     eight int32 times 8 x 2 fixed 64-bit numbers, plus the block's position, mixed nonlinearly, summed over
              the tensor's blocks of 32 KiB; then mixed once more with a salt of dtype and shape. All modulo 2^64.

What is told apart: everything that is a different bit somewhere, so -0 and 0, the payloads of NaN, elements that have
changed places, half and eighth formats; and equal bits under another shape or dtype. A transposed view has the digest
of its copy in row-major order.

Bound. The keys do not depend on the data. Two different rows differ at some byte; whatever the other bytes are, at most
one of its 256 possible key values makes a column's sums equal, so eight independent columns hide it with probability
2^-64 at most, at each level. Two blocks of other level-2 results agree in one lane with probability 2^-38 at most
(differences below 2^26 have at most 25 trailing zeros), in both with 2^-76. A change within one block of 32 KiB is
therefore missed with probability 2^-62 at most. Over several blocks the mixed sums would have to cancel in both lanes:
2^-128 if the mixing (the finaliser of splitmix64, Steele et al. 2014) acts as a random function, which is not proven.
Nothing here resists somebody who knows the keys and wants a collision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_slm.kernels import block_products
from megatron_slm.kernels.row_products import row_products

ROW_BYTES, COLUMNS, LANES = 1024, 8, 2
ROWS = ROW_BYTES // (4 * COLUMNS)
"""Level-1 results that fill a row of level 2."""
DIRECT_ROWS = 32
"""Tensors of fewer rows are gathered first: one product for all of them."""
_BLOCK = np.int64(0x1E3779B97F4A7C15)
"""What a block's position is multiplied by."""
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


class Keys(NamedTuple):
    """The fixed random numbers on one device: level 1 and 2 [ROW_BYTES, COLUMNS] int8, fold [COLUMNS, LANES] int64."""

    first: Tensor
    second: Tensor
    fold: Tensor


class Piece(NamedTuple):
    """Bytes that are gathered before they are multiplied: those of a tensor from ``start`` on."""

    tensor: int
    start: int


@dataclass(frozen=True)
class Layout:
    """Where tensors of given dtypes and shapes go. Rows and blocks are counted over all of them.

    Attributes:
        blocks: of each tensor.
        direct: (tensor, its first row, number of whole rows) of the large ones.
        pieces: the rest: small tensors, and what large ones have behind their last whole row.
        gathered: their bytes [rows, ROW_BYTES], zero behind each piece; kept, because most tensors come every step.
        places: ``gathered``'s part of each piece.
        rows_of_gathered: the level-1 row of each of its rows.
        salts: [tensors, LANES].
    """

    blocks: tuple[int, ...]
    direct: tuple[tuple[int, int, int], ...]
    pieces: tuple[Piece, ...]
    gathered: Tensor
    places: tuple[Tensor, ...]
    rows_of_gathered: Tensor
    salts: NDArray[np.int64]


class Bound(NamedTuple):
    """Tensors that stay where they are, ready to be read again and again: their layout and bytes."""

    layout: Layout
    data: list[Tensor]


class Sheet:
    """Collects tensors of one device and gives all their digests at once: one transfer to the host.

    ``add`` reads the values at once (in the order of the device's stream); a thousandth of their bytes is kept for
    ``finish``.
    """

    def __init__(self) -> None:
        """Hold nothing."""
        self._layouts: dict[tuple[tuple[torch.dtype, torch.Size], ...], Layout] = {}
        self._added: list[Layout] = []
        self._products: list[Tensor] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @torch.no_grad()
    def add(self, tensors: Sequence[Tensor]) -> range:
        """Take in tensors of any shapes and dtypes; returns their places in what ``finish`` gives."""
        return self.add_bound(Bound(self._layout(tensors), [_as_bytes(tensor) for tensor in tensors]))

    @torch.no_grad()
    def add_bound(self, bound: Bound) -> range:
        """The same of tensors as they are now that were bound before."""
        self._added.append(bound.layout)
        self._products.append(_products(bound.layout, bound.data))
        count = len(bound.data)
        places = range(self._count, self._count + count)
        self._count += count
        return places

    @torch.no_grad()
    def bind(self, tensors: Sequence[Tensor]) -> Bound | None:
        """Tensors that will change in value and not in place; None where one is not contiguous, so has no view."""
        if not all(tensor.is_contiguous() for tensor in tensors):
            return None
        return Bound(self._layout(tensors), [_as_bytes(tensor) for tensor in tensors])

    def _layout(self, tensors: Sequence[Tensor]) -> Layout:
        signature = tuple((tensor.dtype, tensor.shape) for tensor in tensors)
        layout = self._layouts.get(signature)
        return layout if layout is not None else self._layouts.setdefault(signature, layout_of(tensors))

    @torch.no_grad()
    def finish(self) -> NDArray[np.uint64]:
        """[added, LANES]: the digests, in the order of their places; the sheet is empty again."""
        if not self._count:
            return np.zeros((0, LANES), dtype=np.uint64)
        blocks = np.array([size for layout in self._added for size in layout.blocks], dtype=np.int64)
        salts = np.concatenate([layout.salts for layout in self._added])
        products = torch.cat(self._products)
        self.clear()
        device = products.device
        owner = np.repeat(np.arange(len(blocks)), blocks)
        position = np.arange(1, len(owner) + 1) - np.repeat(np.cumsum(blocks) - blocks, blocks)
        with np.errstate(over="ignore"):
            offset = torch.from_numpy(position * _BLOCK).to(device)
        folded = (products.to(torch.int64).unsqueeze(-1) * keys(device).fold).sum(dim=1)
        mixed = _mix(folded + offset.unsqueeze(1))
        lanes = torch.from_numpy(salts).to(device)
        lanes.index_add_(0, torch.from_numpy(owner).to(device), mixed)
        found: NDArray[np.uint64] = _mix(lanes).cpu().numpy().view(np.uint64)
        return found

    def clear(self) -> None:
        """Forget what was added."""
        self._added, self._products, self._count = [], [], 0


def digests(tensors: Sequence[Tensor]) -> NDArray[np.uint64]:
    """[tensors, LANES]: the digests of tensors of one device."""
    sheet = Sheet()
    sheet.add(tensors)
    return sheet.finish()


def layout_of(tensors: Sequence[Tensor]) -> Layout:
    """How ``tensors`` and any others of their dtypes and shapes are laid out."""
    blocks: list[int] = []
    direct: list[tuple[int, int, int]] = []
    pieces: list[Piece] = []
    rows_of_gathered: list[int] = []
    sizes: list[tuple[int, int]] = []
    row = 0
    for index, tensor in enumerate(tensors):
        num_bytes = tensor.numel() * tensor.element_size()
        whole, rows = num_bytes // ROW_BYTES, -(-num_bytes // ROW_BYTES)
        if whole >= DIRECT_ROWS:
            direct.append((index, row, whole))
        else:
            whole = 0
        if whole < rows:
            pieces.append(Piece(index, whole * ROW_BYTES))
            sizes.append((rows - whole, num_bytes - whole * ROW_BYTES))
            rows_of_gathered += range(row + whole, row + rows)
        blocks.append(-(-rows // ROWS))
        row += blocks[-1] * ROWS
    device = tensors[0].device if tensors else torch.device("cpu")
    gathered = torch.zeros(len(rows_of_gathered), ROW_BYTES, dtype=torch.int8, device=device)
    starts = np.cumsum([0] + [height * ROW_BYTES for height, _ in sizes])
    flat = gathered.view(-1)
    places = tuple(flat[int(at) : int(at) + length] for at, (_, length) in zip(starts, sizes, strict=False))
    salts = [salt(tensor.dtype, tensor.shape) for tensor in tensors]
    return Layout(
        tuple(blocks),
        tuple(direct),
        tuple(pieces),
        gathered,
        places,
        torch.tensor(rows_of_gathered, dtype=torch.int64, device=device),
        np.array(salts, dtype=np.int64).reshape(-1, LANES),
    )


@cache
def salt(dtype: torch.dtype, shape: torch.Size) -> tuple[int, int]:
    """What tells equal bytes of another dtype or shape apart, a signed 64-bit number for each lane."""
    digest = hashlib.blake2b(f"{dtype} {tuple(shape)}".encode(), digest_size=8 * LANES).digest()
    first, second = np.frombuffer(digest, dtype="<i8").tolist()
    return first, second


@cache
def keys(device: torch.device) -> Keys:
    """The fixed random numbers: bytes of SHAKE-256, uniform, and nothing up our sleeve."""
    size = ROW_BYTES * COLUMNS
    stream = hashlib.shake_256(b"megatron-slm fingerprint 1").digest(2 * size + 8 * COLUMNS * LANES)
    first, second = (
        torch.from_numpy(np.frombuffer(stream, np.int8, size, at).copy()).view(ROW_BYTES, COLUMNS).to(device)
        for at in (0, size)
    )
    fold = torch.from_numpy(np.frombuffer(stream, "<i8", COLUMNS * LANES, 2 * size).astype(np.int64))
    return Keys(first, second, fold.view(COLUMNS, LANES).to(device))


def _products(layout: Layout, data: list[Tensor]) -> Tensor:
    """Level-2 results [blocks, COLUMNS] int32 of the bytes of every tensor."""
    if data and block_products.choose(data[0].device.type)[0]:
        own = keys(data[0].device)
        return block_products.block_products(data, own.first, own.second)
    return _level_2(_level_1(layout, data))


def _level_1(layout: Layout, data: list[Tensor]) -> Tensor:
    """[blocks x ROWS, COLUMNS] int32."""
    device = data[0].device if data else torch.device("cpu")
    out = torch.zeros(sum(layout.blocks) * ROWS, COLUMNS, dtype=torch.int32, device=device)
    key = keys(device).first
    for index, row, whole in layout.direct:
        row_products(data[index][: whole * ROW_BYTES].view(whole, ROW_BYTES), key, out[row : row + whole])
    if layout.pieces:
        found = [data[index][start:] if start else data[index] for index, start in layout.pieces]
        torch._foreach_copy_(layout.places, found)
        products = torch.empty(layout.gathered.shape[0], COLUMNS, dtype=torch.int32, device=device)
        row_products(layout.gathered, key, products)
        out.index_copy_(0, layout.rows_of_gathered, products)
    return out


def _level_2(products: Tensor) -> Tensor:
    """Level-1 results [blocks x ROWS, COLUMNS] -> [blocks, COLUMNS] int32."""
    rows = products.view(-1).view(torch.int8).view(-1, ROW_BYTES)
    out = torch.empty(rows.shape[0], COLUMNS, dtype=torch.int32, device=products.device)
    if rows.shape[0]:
        row_products(rows, keys(products.device).second, out)
    return out


def _mix(values: Tensor) -> Tensor:
    """A bijection of 64-bit numbers that spreads every bit: splitmix64's finaliser."""
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """To the right with zeros; torch's own shift repeats the sign, which would make ``_mix`` two-to-one."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _as_bytes(tensor: Tensor) -> Tensor:
    """The elements in row-major order, [bytes] int8; a view where the tensor is contiguous. Without a gradient."""
    elements = tensor.contiguous().view(-1)
    if elements.numel() == 1:  # contiguous whatever its stride is, and a view of another format wants a stride of 1
        elements = elements.as_strided((1,), (1,))
    return elements.view(torch.int8)
