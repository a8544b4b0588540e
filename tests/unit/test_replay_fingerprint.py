"""Digests tell every difference apart that a bit can make, and equal values never."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_slm.kernels import row_products
from megatron_slm.replay import fingerprint
from megatron_slm.replay.fingerprint import Sheet, digests


def digest(tensor: Tensor) -> tuple[int, int]:
    first, second = digests([tensor])[0].tolist()
    return first, second


def made_up(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def bits(value: int, dtype: torch.dtype) -> Tensor:
    """A tensor of a float dtype with some elements, one of which has these bits."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    elements = torch.arange(300, dtype=torch.int64).to(whole)
    elements[7] = value
    return elements.view(dtype)


PAIRS = {
    "a permutation": (torch.arange(5000.0), torch.arange(5000.0).roll(1)),
    "two elements changed places": (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])),
    "whole rows changed places": (made_up(4, 256), made_up(4, 256)[[1, 0, 2, 3]]),
    "whole blocks changed places": (made_up(4, 8192), made_up(4, 8192)[[1, 0, 2, 3]]),
    "the sign of zero": (torch.zeros(10), torch.zeros(10).neg()),
    "one sign of zero among many": (torch.zeros(10_000), torch.zeros(10_000).index_fill(0, torch.tensor(9_999), -0.0)),
    "a NaN's payload": (bits(0x7FC00000, torch.float32), bits(0x7FC00001, torch.float32)),
    "a NaN's payload in bf16": (bits(0x7FC0, torch.bfloat16), bits(0x7FC1, torch.bfloat16)),
    "a NaN's sign in fp8": (bits(0x7F, torch.float8_e4m3fn), bits(0xFF, torch.float8_e4m3fn)),
    "one bit in fp8": (bits(0x38, torch.float8_e5m2), bits(0x39, torch.float8_e5m2)),
    "another duplicated pair": (torch.tensor([5.0, 5.0, 1.0]), torch.tensor([6.0, 6.0, 1.0])),
    "two signs flipped": (made_up(4096), made_up(4096) * torch.ones(4096).index_fill(0, torch.tensor([3, 900]), -1.0)),
    "a transposed view": (made_up(64, 64), made_up(64, 64).t()),
    "another shape": (made_up(64, 32), made_up(64, 32).view(32, 64)),
    "another dtype": (torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.float32)),
    "more zeros": (torch.zeros(8), torch.zeros(9)),
    "nothing, of other shapes": (torch.zeros(0, 3), torch.zeros(3, 0)),
    "a scalar and one element": (torch.tensor(1.0), torch.tensor([1.0])),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_is_told_apart(name: str) -> None:
    first, second = (digest(tensor) for tensor in PAIRS[name])
    assert first[0] != second[0] and first[1] != second[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_equal_values_have_equal_digests_whatever_their_storage(dtype: torch.dtype) -> None:
    values = made_up(96, 130).to(dtype)
    buffer = torch.zeros(3 + values.numel(), dtype=dtype)
    inside = buffer[3:].view(96, 130)
    inside.copy_(values)
    strided = values.t().contiguous().t()
    known = digest(values)
    assert [digest(other) for other in (values.clone(), inside, strided)] == [known] * 3
    one = values[:1, :1].squeeze(1)
    assert one.stride() != (1,) and digest(one) == digest(one.clone().reshape(1).contiguous())


def test_every_single_bit_counts() -> None:
    """Of a tensor that spans gathered and direct rows, two blocks and an incomplete row."""
    values = made_up(17_001)
    known = {digest(values)}
    words = values.view(torch.int32)
    for position, bit in itertools.product((0, 255, 256, 8191, 8192, 16_999, 17_000), (0, 1, 15, 22, 23, 30)):
        words[position] ^= 1 << bit
        found = digest(values)
        assert found not in known
        known.add(found)
        words[position] ^= 1 << bit
    assert digest(values) in known


def test_no_collision_among_many_small_tensors() -> None:
    """4,096 tensors that differ in 12 bits: each lane alone tells them apart."""
    values = torch.arange(4096, dtype=torch.int32).view(-1, 1)
    found = digests(list(values.unbind(0)))
    assert len(np.unique(found[:, 0])) == len(np.unique(found[:, 1])) == len(found)
    ones = np.unpackbits(found.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 0.004, "the lanes look like fair coins"


def test_batching_does_not_matter() -> None:
    tensors = [made_up(size) for size in (3, 40_000, 256, 0, 8192, 70_001, 1)]
    together = digests(tensors)
    assert [tuple(row) for row in together.tolist()] == [digest(tensor) for tensor in tensors]
    sheet = Sheet()
    for _ in range(2):  # the second time everything is laid out already
        places = [sheet.add([tensors[0], tensors[1]]), sheet.add(tensors[2:])]
        assert [list(place) for place in places] == [[0, 1], [2, 3, 4, 5, 6]] and len(sheet) == 7
        assert np.array_equal(sheet.finish(), together) and len(sheet) == 0
    assert sheet.finish().shape == (0, 2)


def test_is_read_when_it_is_added() -> None:
    values, sheet = made_up(50_000), Sheet()
    known = digest(values)
    sheet.add([values])
    values.zero_()
    assert tuple(sheet.finish()[0].tolist()) == known


def test_threads_do_not_matter() -> None:
    values, before = made_up(1_000_001), torch.get_num_threads()
    known = digest(values)
    try:
        torch.set_num_threads(3)
        assert digest(values) == known
    finally:
        torch.set_num_threads(before)


def test_definition_is_fixed() -> None:
    """Streams of older versions stay comparable: a change here needs another magic in ``replay/stream.py``."""
    assert digest(torch.arange(100_000)) == (0xC8214DD373B44FE2, 0xD1FD0C6458B7EB3F)


def test_plain_definition_gives_the_same() -> None:
    """The docstring's tree, in Python's whole numbers."""
    data = bytes(range(256)) * 130 + b"tail"
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    key = fingerprint.keys(torch.device("cpu"))
    padded = np.frombuffer(data + bytes(-len(data) % (1024 * 32)), np.int8).reshape(-1, 1024).astype(np.int64)
    first = (padded @ key.first.numpy().astype(np.int64)).astype("<i4")
    second = first.view(np.int8).reshape(-1, 1024).astype(np.int64) @ key.second.numpy().astype(np.int64)
    lanes = [number % 2**64 for number in fingerprint.salt(tensor.dtype, tensor.shape)]
    for position, row in enumerate(second.tolist(), start=1):
        for lane, column in enumerate(zip(*key.fold.tolist(), strict=True)):
            folded = sum(a * b for a, b in zip(row, column, strict=True)) + position * 0x1E3779B97F4A7C15
            lanes[lane] += mixed(folded)
    assert digest(tensor) == tuple(map(mixed, lanes))


def mixed(value: int) -> int:
    """splitmix64's finaliser."""
    value %= 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def test_both_products_are_exact() -> None:
    rows = torch.randint(-128, 128, (1100, 1024), dtype=torch.int8)
    rows[0], rows[1] = -128, 127
    key = torch.randint(-128, 128, (1024, 8), dtype=torch.int8)
    key[:, 0], key[:, 1] = -128, 127
    wanted = row_products.reference(rows, key)
    for product in (row_products._integer, row_products._float):
        out = torch.zeros(1100, 8, dtype=torch.int32)
        product(rows, key, out)
        assert torch.equal(out, wanted)


def test_a_product_that_saturates_is_not_chosen() -> None:
    def saturating(rows: Tensor, key: Tensor, out: Tensor) -> None:
        pairs = (rows.int().unsqueeze(-1) * key.int()).view(rows.shape[0], -1, 2, key.shape[1]).sum(dim=2)
        out.copy_(pairs.clamp(-(2**15), 2**15 - 1).sum(dim=1))

    assert not row_products._is_exact(saturating, "cpu")
    assert row_products._is_exact(row_products._float, "cpu")
