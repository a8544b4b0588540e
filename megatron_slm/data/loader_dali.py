"""The batches of ``data/loader.py`` through a pipeline of NVIDIA DALI: the same samples, the same order, the same bits.

What comes next follows from the cursor alone, so nothing of DALI's own state is saved: a checkpoint of DALI counts
iterations, and with another batch size it would go on elsewhere without a word. The pipeline is made anew wherever the
cursor asks for something else than the next micro-batch: after a resume, a roll-back, a change of the shares.

B samples of S tokens. On CUDA ranks tokens cross to the GPU once, as int32, while the step before is still running; the
pipeline widens and cuts them there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_slm.data.batch import Batch, Samples, fields_beside
from megatron_slm.data.config import DataConfig
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.loader import TrainLoader
from megatron_slm.data.mixture import MixtureOrder

ON_HOST = ("document_ids",)
"""Attention reads the documents' boundaries before it launches kernels."""


class DaliLoader(TrainLoader):
    """Training samples in the order of a cursor, as :class:`TrainLoader` gives them.

    Args:
        corpora: see :class:`TrainLoader`.
        device_id: GPU that the tensors are put on; None leaves them on the host.
    """

    def __init__(
        self,
        corpora: Mapping[str, Samples],
        *,
        config: DataConfig,
        seq_length: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        device_id: int | None,
    ) -> None:
        super().__init__(
            corpora,
            config=config,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
        )
        self.device_id = device_id
        self._order: MixtureOrder | None = None
        self._next_position = 0
        self._batches: Iterator[Batch] = iter(())

    def _batch(self, cursor: Cursor, micro_batch: int) -> Batch:
        start = self.positions(micro_batch, cursor.consumed_samples).start
        # A pipeline reads ahead, so it holds for the order and the position that it was made for, and for no other.
        if cursor.order is not self._order or start != self._next_position:
            self._order = cursor.order
            self._batches = self._pipeline_from(cursor.order, start)
        self._next_position = start + self.micro_batch_size * self.data_parallel_size
        return next(self._batches)

    def _pipeline_from(self, order: MixtureOrder, start: int) -> Iterator[Batch]:
        """This rank's micro-batches from position ``start`` on: how they are grouped into steps does not matter."""
        documents = ["document_ids"] if self.config.reset_attention_mask else []
        names = ["loss_mask", *documents, "position_ids"]
        return _batches(_MicroBatches(self, order, start, names), names, self)

    def rows_at(self, order: MixtureOrder, positions: Sequence[int]) -> np.ndarray:
        """Tokens of the samples at ``positions``, int32 [B, S + 1]."""
        rows = np.empty((len(positions), self.seq_length + 1), dtype=np.int32)
        for row, position in enumerate(positions):
            found = order.sample_id(position)
            rows[row] = self.corpora[found.source].sample(found.index, self.seq_length)
        return rows

    def windows_at(self, positions: Sequence[int]) -> list[int] | None:
        """Tokens of a window at each of ``positions``; None where samples are whole."""
        return [self._window(position) for position in positions] if self.windows else None


class _MicroBatches:
    """What DALI asks for an iteration's arrays. A callable and no generator: DALI asks by number and in advance."""

    def __init__(self, loader: DaliLoader, order: MixtureOrder, start: int, names: Sequence[str]) -> None:
        self._loader, self._order, self._start, self._names = loader, order, start, names

    def __call__(self, info: Any) -> list[list[np.ndarray]]:
        """Rows [S + 1], then every field [S], each as a list over the samples of a micro-batch.

        Args:
            info: DALI's BatchInfo.
        """
        loader = self._loader
        start = self._start + info.iteration * loader.micro_batch_size * loader.data_parallel_size
        positions = range(start, start + loader.micro_batch_size)
        rows = loader.rows_at(self._order, positions)
        fields = fields_beside(
            rows[:, :-1],
            eod_id=loader.eod_id,
            reset_attention_mask=loader.config.reset_attention_mask,
            reset_position_ids=loader.config.reset_position_ids,
            eod_mask_loss=loader.config.eod_mask_loss,
            windows=loader.windows_at(positions),
        )
        return [list(rows), *(list(fields[name]) for name in self._names)]


def _batches(source: _MicroBatches, names: Sequence[str], loader: DaliLoader) -> Iterator[Batch]:
    """What the pipeline gives, endlessly. Its tensors are the batch's own: DALI uses its buffers again."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    on_gpu = loader.device_id is not None
    kinds = {"loss_mask": types.FLOAT, "position_ids": types.INT64, "document_ids": types.INT64}

    # One thread suffices: it widens and cuts what the memory map gives.
    @pipeline_def(batch_size=loader.micro_batch_size, num_threads=1, device_id=loader.device_id)
    def pipeline() -> tuple[Any, ...]:
        rows, *fields = fn.external_source(
            source=source,
            num_outputs=1 + len(names),
            batch=True,
            batch_info=True,
            dtype=[types.INT32, *(kinds[name] for name in names)],
            ndim=1,
        )
        placed = [
            field.gpu() if on_gpu and name not in ON_HOST else field for name, field in zip(names, fields, strict=True)
        ]
        tokens = fn.cast(rows.gpu() if on_gpu else rows, dtype=types.INT64)
        length = loader.seq_length
        return tokens[0:length], tokens[1 : length + 1], *placed

    for batches in DALIGenericIterator([pipeline()], ["tokens", "labels", *names]):
        yield batches[0]
