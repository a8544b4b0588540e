"""The global hash is of the tensors alone: cut in any way they hash the same, and nothing else does."""

from __future__ import annotations

import hashlib
import pickle
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_slm.errors import CheckpointError
from megatron_slm.train import global_hash
from megatron_slm.train.global_hash import combined, differing, row_blocks, tensor_hashes
from megatron_slm.train.payload import to_metadata
from megatron_slm.train.payload_blocks import Block, TensorReader
from megatron_slm.train.payload_index import METADATA_FILE, Chunk, PayloadIndex, Span, StoredTensor
from tests.checkpoints import part, whole, write_payload

SHAPES = [(), (1,), (7,), (5, 6), (1, 9), (3, 4, 5), (2, 3, 4, 2), (0, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]


def made(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul(9).to(dtype)


def any_cut(block: Block, draw: random.Random) -> Iterator[Block]:
    """Boxes of uneven sizes, on any axes, that are the block."""
    long = [axis for axis, size in enumerate(block.sizes) if size > 1]
    if not long or draw.random() < 0.25:
        yield block
        return
    axis = draw.choice(long)
    at = draw.randrange(1, block.sizes[axis])
    for offset, size in ((0, at), (at, block.sizes[axis] - at)):
        offsets = tuple(o + offset * (n == axis) for n, o in enumerate(block.offsets))
        yield from any_cut(Block(offsets, tuple(size if n == axis else s for n, s in enumerate(block.sizes))), draw)


def stored_hash(directory: Path, name: str, tensor: torch.Tensor, blocks: list[Block]) -> str:
    directory.mkdir(parents=True)
    index = write_payload(directory, [(name, tensor, blocks)])
    return combined(tensor_hashes(directory, index))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_cut_in_any_way_hash_the_same(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 24 bytes, so that rows and parts of rows are read one after the other; and read as torch reads them."""
    monkeypatch.setattr(global_hash, "BLOCK_BYTES", 24)
    for number, shape in enumerate(SHAPES):
        tensor, draw = made(shape, dtype), random.Random(number)
        expected = hashlib.blake2b(tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), digest_size=32).hexdigest()
        for cut in range(4):
            blocks = whole(tensor) if cut == 0 else list(any_cut(whole(tensor)[0], draw))
            directory = tmp_path / f"{number}-{cut}"
            found = stored_hash(directory, "name", tensor, blocks)
            assert tensor_hashes(directory)["name"].split()[-1] == expected, (shape, blocks)
            assert found == combined(tensor_hashes(tmp_path / f"{number}-0"))


def test_name_dtype_shape_and_every_bit_count(tmp_path: Path) -> None:
    tensor = made((4, 6), torch.float32)
    flipped = tensor.clone()
    flipped.view(torch.int32)[3, 5] ^= 1
    cases = {
        "as is": ("name", tensor),
        "name": ("other", tensor),
        "shape": ("name", tensor.view(6, 4)),
        "dtype": ("name", tensor.view(torch.int32)),
        "bit": ("name", flipped),
    }
    hashes = {why: stored_hash(tmp_path / why, name, data, whole(data)) for why, (name, data) in cases.items()}
    assert len(set(hashes.values())) == len(cases)
    found = {why: tensor_hashes(tmp_path / why) for why in cases}
    assert differing(found["as is"], found["as is"]) == []
    assert differing(found["as is"], found["bit"]) == ["name: other values"]
    assert differing(found["as is"], found["dtype"]) == ["name: float32 4x6 and int32 4x6"]
    assert differing(found["as is"], found["name"]) == ["name: only in the first", "other: only in the second"]


@pytest.mark.parametrize("limit", [1, 2, 5, 7, 12, 1000])
def test_row_blocks_are_the_tensor_in_order(limit: int) -> None:
    for shape in SHAPES:
        tensor = torch.arange(torch.Size(shape).numel()).view(shape)
        blocks = list(row_blocks(shape, limit))
        assert all(block.num_elements <= limit for block in blocks)
        pieces = [part(tensor, block).reshape(-1) for block in blocks]
        assert torch.cat([torch.empty(0, dtype=torch.int64), *pieces]).equal(tensor.reshape(-1))


def test_any_block_is_what_indexing_gives(tmp_path: Path) -> None:
    tensor, draw = made((6, 5, 8), torch.bfloat16), random.Random(1)
    (tmp_path / "c").mkdir()
    index = write_payload(tmp_path / "c", [("name", tensor, list(any_cut(whole(tensor)[0], draw)))])
    reader = TensorReader(tmp_path / "c", "name", index.tensors["name"])
    for _ in range(50):
        offsets = tuple(draw.randrange(size) for size in tensor.shape)
        block = Block(offsets, tuple(draw.randint(1, n - o) for n, o in zip(tensor.shape, offsets, strict=True)))
        found = torch.empty(block.num_elements, dtype=tensor.dtype)
        reader.read(block, found.view(torch.uint8).numpy().data)
        assert found.view(block.sizes).equal(part(tensor, block))


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    tensor = torch.arange(8 << 20, dtype=torch.int32).view(4, 1 << 10, 1 << 11)
    by_column = [Block((0, 0, start), (4, 1 << 10, 1 << 9)) for start in range(0, 1 << 11, 1 << 9)]
    index = write_payload(tmp_path, [("name", tensor, by_column)])
    tracemalloc.start()
    tensor_hashes(tmp_path, index)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * global_hash.BLOCK_BYTES < tensor.nbytes / 8


def damage_gap(path: Path) -> None:
    write_payload(
        path, [("name", made((4, 4), torch.float32), [Block((0, 0), (4, 2)), Block((1, 2), (3, 2))])], files=3
    )


def damage_cut_off(path: Path) -> None:
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:700])


class Harmful:
    """A pickle of it would call ``print``."""

    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("it ran",))


def store(path: Path, value: object) -> None:
    """Put something else where the index promises a tensor [4, 4]."""
    with (path / "__0_0.distcp").open("wb") as stream:
        torch.save(value, stream)
        length = stream.tell()
    chunk = Chunk((0, 0), (4, 4), Span("__0_0.distcp", 0, length))
    index = PayloadIndex({"name": StoredTensor("float32", (4, 4), (chunk,))}, {})
    (path / METADATA_FILE).write_bytes(pickle.dumps(to_metadata(index)))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a gap": (damage_gap, "do not cover it"),
    "cut off": (damage_cut_off, "is damaged at name"),
    "a transposed tensor": (lambda path: store(path, made((4, 4), torch.float32).t()), "refused at name.*row by row"),
    "another shape": (lambda path: store(path, made((4, 5), torch.float32)), "refused at name.*promises"),
    "a call": (lambda path: store(path, Harmful()), "refused at name: it names .*print"),
    "a list": (lambda path: store(path, [1, 2]), "refused at name: it holds no tensor"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    strike, said = DAMAGE[damage]
    write_payload(tmp_path, [("name", made((4, 4), torch.float32), whole(torch.empty(4, 4)))], files=1)
    strike(tmp_path)
    with pytest.raises(CheckpointError, match=said):
        tensor_hashes(tmp_path)
    assert "it ran" not in capsys.readouterr().out
