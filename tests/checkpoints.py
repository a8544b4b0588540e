"""Checkpoints made by hand, without ranks and without a model: tensors of any names and shapes, cut in any way."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_slm.config.load import load
from megatron_slm.train import publish
from megatron_slm.train.payload import to_metadata
from megatron_slm.train.payload_blocks import Block
from megatron_slm.train.payload_index import METADATA_FILE, Chunk, PayloadIndex, Span, StoredTensor
from megatron_slm.train.run_directory import IDENTITY, digest
from megatron_slm.train.saved_state import SavedState

LAYOUT = {"world_size": 1, "vpp": 1, "tp": 1, "cp": 1, "dp": 1, "pp": 1}


def write_payload(directory: Path, cut: Iterable[tuple[str, Tensor, Sequence[Block]]], files: int = 2) -> PayloadIndex:
    """The tensors in pieces, which take turns in the files; and their index."""
    tensors = {}
    for name, tensor, blocks in cut:
        chunks = []
        for number, block in enumerate(blocks):
            file = f"__{number % files}_0.distcp"
            with (directory / file).open("ab") as stream:
                start = stream.tell()
                torch.save(part(tensor, block), stream)
                chunks.append(Chunk(block.offsets, block.sizes, Span(file, start, stream.tell() - start)))
        tensors[name] = StoredTensor(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tuple(chunks))
    index = PayloadIndex(tensors, {})
    (directory / METADATA_FILE).write_bytes(pickle.dumps(to_metadata(index)))
    return index


def part(tensor: Tensor, block: Block) -> Tensor:
    """A copy of one block."""
    return tensor[tuple(slice(o, o + s) for o, s in zip(block.offsets, block.sizes, strict=True))].clone()


def whole(tensor: Tensor) -> list[Block]:
    """The tensor in one piece."""
    return [Block((0,) * tensor.dim(), tuple(tensor.shape))]


def by_layer(tensor: Tensor, *, halves: bool = False) -> list[Block]:
    """A piece for each layer, as core cuts stacked ones; the halves of a gated matrix each for itself."""
    cuts, (layers, rows, *rest) = 1 + halves, tensor.shape
    return [
        Block((layer, half * rows // cuts, *(0 for _ in rest)), (1, rows // cuts, *rest))
        for layer in range(layers)
        for half in range(cuts)
    ]


def write_run(run: Path, cut: Iterable[tuple[str, Tensor, Sequence[Block]]], *overrides: str, step: int = 3) -> Path:
    """A run's directory with one published checkpoint of these tensors, saved by one rank."""
    temporary = publish.begin(run / "checkpoints", step)
    write_payload(temporary, cut, files=1)
    state = SavedState(
        step=step,
        consumed_samples=8 * step,
        cursor={},
        layout=dict(LAYOUT),
        params_dtype="float32",
        tokenizer_hash="0",
    )
    (temporary / "state.json").write_text(state.to_json())
    (temporary / "config.yaml").write_text(load(None, ["--preset", "tiny", "name=source", *overrides]).to_yaml())
    torch.save({}, temporary / "common.pt")
    (temporary / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (temporary / "tokenizer").mkdir()
    (temporary / "tokenizer" / "tokenizer.model").write_bytes(b"words")
    final = publish.checkpoint_path(run / "checkpoints", step)
    publish.publish(temporary, final, identity=digest({}))
    (run / IDENTITY).write_text('{"fields": {}}')
    return final
