"""A checkpoint with adapters -> one without, whose weights hold them. One process, one layer of a weight at a time."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from megatron_slm.config.load import load
from megatron_slm.convert.adapters import StoredAdapters, merged
from megatron_slm.convert.output import refuse_existing, whole_or_nothing
from megatron_slm.model.config import ADAPTER_SUFFIX, LoraConfig
from megatron_slm.train import manifest, recovery
from megatron_slm.train.global_hash import row_blocks
from megatron_slm.train.payload import read_object
from megatron_slm.train.payload_index import is_weight
from megatron_slm.train.payload_stream import PayloadWriter
from megatron_slm.train.saved_state import STATE_FILE

RECORD = "merged_lora"
"""Under this name ``state.json`` remembers what was merged."""

COPIED_ELEMENTS = 1 << 24
"""Of a tensor that stays as it is, copied at a time."""


def merge_lora(checkpoint: Path, output: Path) -> tuple[Path, int]:
    """Write checkpoint ``output`` with the adapters in its weights and no optimizer, whole or not at all.

    Args:
        checkpoint: a run's directory, whose newest whole checkpoint is used, or one of its checkpoints.

    Returns:
        The checkpoint that was read, and how many weights have changed, every layer counted.

    Raises:
        CheckpointError: there are no adapters, the checkpoint is damaged, or ``output`` exists or cannot be written.
    """
    refuse_existing(output)
    found = recovery.find(checkpoint)
    resolved = load(found.path / "config.yaml")
    adapters = StoredAdapters(found.path)
    with whole_or_nothing(output) as temporary:
        count = _write_payload(found.path, adapters, resolved.config.lora, temporary)
        plain = replace(resolved, config=replace(resolved.config, lora=LoraConfig()))
        (temporary / "config.yaml").write_text(plain.to_yaml(), encoding="utf-8")
        shutil.copytree(found.path / "tokenizer", temporary / "tokenizer")
        lora = resolved.config.lora
        record = {"checkpoint": str(found.path.resolve()), "rank": lora.lora_rank, "scale": lora.scale}
        state = replace(found.state, records={RECORD: record}, parts=[], global_hash="")
        (temporary / STATE_FILE).write_text(state.to_json(), encoding="utf-8")
        manifest.seal(temporary, step=state.step, identity="")
    return found.path, count


def _write_payload(path: Path, adapters: StoredAdapters, lora: LoraConfig, directory: Path) -> int:
    """The weights, changed or as they are, and the layers' other objects; returns how many were changed."""
    writer, index, count = PayloadWriter(directory), adapters.index, 0
    for name, stored in index.tensors.items():
        if not is_weight(name) or ADAPTER_SUFFIX in name:
            continue
        if name not in adapters.weights:
            for block in row_blocks(stored.shape, COPIED_ELEMENTS):
                data = adapters.reader.block(name, block.offsets, block.sizes)
                writer.block(name, data, offsets=block.offsets, shape=stored.shape)
            continue
        for layer in adapters.layers(name):
            data = merged(adapters.matrix(name, layer), *adapters.factors(name, layer), lora.scale)
            sizes = (*(1 for _ in layer), *data.shape)
            writer.block(name, data.view(sizes), offsets=(*layer, 0, 0), shape=stored.shape)
            count += 1
    for name in index.objects:
        if is_weight(name):
            writer.value(name, read_object(path, index, name))
    writer.close()
    return count
