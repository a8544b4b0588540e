"""A checkpoint of any layout -> a Hugging Face model's directory, tensor by tensor."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_slm.config.load import load
from megatron_slm.convert import logits
from megatron_slm.convert.blocks import RECORD, read_block, same_bits
from megatron_slm.convert.model_files import ModelFiles
from megatron_slm.convert.model_writer import Declared, ModelWriter
from megatron_slm.convert.output import refuse_existing, versions, whole_or_nothing
from megatron_slm.convert.report import Report, TensorRow
from megatron_slm.convert.tokenizer_files import tokenizer_notes, write_tokenizer
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import CheckpointError
from megatron_slm.model.config import ModelConfig
from megatron_slm.model.hf import EMBEDDING, Block, blocks
from megatron_slm.model.hf_config import CONFIG_FILE
from megatron_slm.model.hf_config_out import choose_model_type, huggingface_config
from megatron_slm.train import recovery
from megatron_slm.train.checkpoint import has_adapters
from megatron_slm.train.ema import PREFIX
from megatron_slm.train.payload_index import is_weight, read_index
from megatron_slm.train.payload_stream import BlockReader


@dataclass(frozen=True)
class Wish:
    """How a checkpoint is to be written.

    Attributes:
        model_type: of config.json; None takes the one it was imported from, or the first that can express the model.
        dtype: of every tensor, by torch's name; None is as they are stored.
        max_shard_bytes: of one file.
        ema: the averages of the weights instead of them.
        compare_logits: with transformers, which must be installed.
    """

    model_type: str | None = None
    dtype: str | None = None
    max_shard_bytes: int = 5 * 10**9
    ema: bool = False
    compare_logits: bool = True


class Stored:
    """The weights of a checkpoint as blocks; every one that Hugging Face's names need is there, and no other.

    Args:
        prefix: of the stored names.
        dtype: that they are rounded to, by torch's name; None is as stored.

    Attributes:
        dtypes: tensor -> the dtype that is read.
        rounded: the argument ``dtype``.

    Raises:
        CheckpointError: a tensor is missing, too many, or of another shape.
    """

    def __init__(self, path: Path, expected: list[Block], *, prefix: str, dtype: str | None) -> None:
        index = read_index(path)
        self._reader, self._prefix, self.rounded = BlockReader(path, index), prefix, dtype
        self.dtypes: dict[str, str] = {}
        for block in expected:
            stored = index.tensors.get(prefix + block.name)
            if stored is None or stored.shape != block.global_shape:
                there = "no such tensor" if stored is None else f"shape {list(stored.shape)}"
                raise CheckpointError(
                    f"{path} has {there} for {prefix + block.name}, of which its config.yaml asks for "
                    f"{list(block.global_shape)}; choose a checkpoint whose config.yaml is its own"
                )
            self.dtypes[block.name] = dtype or stored.dtype
        if not prefix and has_adapters(index.tensors):
            raise CheckpointError(
                f"{path} has adapters (LoRA): put them into the weights with mslm checkpoint merge-lora and export "
                "that, or export them alone with mslm convert peft-export"
            )
        if extra := sorted({name for name in index.tensors if is_weight(name)} - set(self.dtypes)):
            raise CheckpointError(
                f"{path} has {extra[0]} (and {len(extra) - 1} more), for which Hugging Face's model has no name; it "
                "cannot be exported"
            )

    def read(self, block: Block) -> Tensor:
        """One block, of its shape without stacked axes."""
        return read_block(self._reader, block, self._prefix).to(getattr(torch, self.dtypes[block.name]))


def export_model(checkpoint: Path, output: Path, wish: Wish) -> Report:
    """Write the Hugging Face model ``output``, whole or not at all.

    Args:
        checkpoint: a run's directory, whose newest whole checkpoint is used, or one of its checkpoints.

    Raises:
        CheckpointError, ConfigError, DataError: the checkpoint, the wish or ``output`` is refused.
        ConversionError: the files do not give back what they were made from; they are not published.
    """
    refuse_existing(output)
    found = recovery.find(checkpoint)
    if wish.ema and "ema" not in found.state.parts:
        raise CheckpointError(
            f"{found.path} holds no averaged weights: its run did not have train.ema_decay; leave --ema out"
        )
    config = load(found.path / "config.yaml").config
    origin = found.state.records.get(RECORD, {})
    model_type = choose_model_type(config.model, wish.model_type or origin.get("model_type"))
    vocab_size = config.model.vocab_size or _tokenizer(found).vocab_size
    expected = blocks(config.model, model_type, vocab_size)
    stored = Stored(found.path, expected, prefix=PREFIX if wish.ema else "", dtype=wish.dtype)
    if wish.compare_logits:
        logits.require_comparable(config.model, vocab_size)
    report = _new_report(found.path, config.model, model_type, vocab_size, stored)
    with whole_or_nothing(output) as temporary:
        _write_weights(expected, stored, temporary, wish.max_shard_bytes)
        tokens, notes = write_tokenizer(found.path / "tokenizer", temporary)
        report.notes += notes
        tokens |= origin.get("tokens", {})
        described = huggingface_config(
            config.model, model_type, vocab_size=vocab_size, dtype=report.dtype, tokens=tokens
        )
        (temporary / CONFIG_FILE).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        report.tensors = _round_trip(expected, stored, temporary)
        report.require()
        if wish.compare_logits:
            rounded = getattr(torch, wish.dtype) if wish.dtype is not None else None
            report.logits = logits.compare(
                found.path, temporary, config, vocab_size=vocab_size, ema=wish.ema, rounded=rounded
            )
            report.require()
            report.notes += tokenizer_notes(temporary, found.path / "tokenizer")
        else:
            report.without_logits = "--no-logits was given"
        report.write(temporary)
    return report


def _tokenizer(found: recovery.Recovered) -> Tokenizer:
    return Tokenizer.open(found.path / "tokenizer", expected_hash=found.state.tokenizer_hash)


def _new_report(path: Path, model: ModelConfig, model_type: str, vocab_size: int, stored: Stored) -> Report:
    rounded = "" if stored.rounded is None else f", rounded to {stored.rounded}"
    return Report(
        direction="hf-export",
        source=str(path.resolve()),
        model_type=model_type,
        dtype=stored.dtypes[EMBEDDING],
        vocab_size=vocab_size,
        padding=model.padded_vocab_size(vocab_size) - vocab_size,
        compared="Each tensor was read from the files again, put into the checkpoint's form, and compared with the "
        f"checkpoint{rounded} bit by bit; the padding rows of the vocabulary are in the checkpoint alone.",
        versions=versions(),
    )


def _write_weights(expected: list[Block], stored: Stored, directory: Path, max_shard_bytes: int) -> None:
    """The safetensors files; read in the checkpoint's order, divided over files layer by layer."""
    declared = [
        Declared(part.name, part.shape, stored.dtypes[block.name])
        for block in sorted(expected, key=_layer)
        for part in block.parts
    ]
    writer = ModelWriter(directory, declared, max_shard_bytes)
    for block in expected:
        for part, piece in zip(block.parts, block.split(stored.read(block)), strict=True):
            writer.write(part.name, piece)
    writer.close()


def _layer(block: Block) -> float:
    """Where a block stands in the model: the embedding, the layers in order, the final norm and the output."""
    return block.index[0] if block.index else -1.0 if block.name.startswith("embedding.") else math.inf


def _round_trip(expected: list[Block], stored: Stored, directory: Path) -> list[TensorRow]:
    """Every written tensor, put back into the checkpoint's form and compared with it."""
    files = ModelFiles(directory)
    rows = []
    for block in expected:
        back, there = block.join([files.read(part.name) for part in block.parts]), stored.read(block)
        equal = same_bits(back[: block.rows], there[: block.rows])
        rows += [TensorRow(part.name, part.shape, stored.dtypes[block.name], equal) for part in block.parts]
    return rows
