"""Rows and prompts for one data-parallel rank, by the position rule of ``data/loader.py``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_slm.data.cursor import Cursor
from megatron_slm.data.examples.document import Batch, Row, build_rows
from megatron_slm.data.examples.prompts import Prompt, Prompts
from megatron_slm.data.examples.rows import RowSource
from megatron_slm.data.loader import RankLoader


class RowLoader(RankLoader):
    """Rows in the order of a cursor. All tp, cp and pp ranks of one dp rank read the same batches.

    Args:
        sources: what every source of the order is read from; of one tokenizer.
    """

    def __init__(
        self,
        sources: Mapping[str, RowSource],
        *,
        seq_length: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        super().__init__(
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
        )
        self.sources = sources
        self.eod_id = next(iter(sources.values())).eod_id

    def micro_batches(self, cursor: Cursor, global_batch_size: int) -> Iterator[Batch]:
        """This rank's micro-batches of the step that begins at ``cursor``; see ``document.build_rows``.

        Raises:
            ConfigError: the global batch does not divide; raised here, before the first row is read.
        """
        count = self.num_micro_batches(global_batch_size)
        assert cursor.seq_length == self.seq_length, f"the order is for {cursor.seq_length} tokens"
        return (self._batch(cursor, micro_batch) for micro_batch in range(count))

    def _batch(self, cursor: Cursor, micro_batch: int) -> Batch:
        rows: list[Row | None] = []
        for position in self.positions(micro_batch, cursor.consumed_samples):
            found = cursor.order.sample_id(position)
            rows.append(self.sources[found.source].row(found.index))
        return build_rows(rows, seq_length=self.seq_length, eod_id=self.eod_id)


class ValidRowLoader(RankLoader):
    """The valid split in natural order, dealt as :class:`megatron_slm.data.loader.ValidLoader` deals samples: the first
    ``min(eval_iters * global_batch_size, rows)`` rows, each exactly once; slots that remain have a loss mask of 0.
    """

    def __init__(
        self,
        rows: RowSource,
        *,
        seq_length: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        super().__init__(
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
        )
        self.rows = rows

    def num_samples(self, eval_iters: int, global_batch_size: int) -> int:
        """Rows that one validation uses."""
        return min(eval_iters * global_batch_size, self.rows.num_samples)

    def steps(self, eval_iters: int, global_batch_size: int, *, multiple: int = 1) -> Iterator[list[Batch]]:
        """The micro-batches of this rank, step by step; every rank gets the same number of each.

        Args:
            multiple: the micro-batches of a step must be a multiple of this (the pipeline size, when interleaved). The
                last step is cut to the smallest such number that holds the rows left.

        Raises:
            ConfigError: the global batch does not divide.
        """
        per_step = self.num_micro_batches(global_batch_size)
        assert per_step % multiple == 0, f"{per_step} micro-batches of a step are not a multiple of {multiple}"
        return self._steps(self.num_samples(eval_iters, global_batch_size), per_step, multiple)

    def _steps(self, samples: int, per_step: int, multiple: int) -> Iterator[list[Batch]]:
        width = self.micro_batch_size * self.data_parallel_size
        for start in range(0, samples, per_step * width):
            needed = -(-(samples - start) // (width * multiple)) * multiple
            yield [self._batch(k, start, samples) for k in range(min(per_step, needed))]

    def _batch(self, micro_batch: int, start: int, samples: int) -> Batch:
        positions = self.positions(micro_batch, start)
        rows = [self.rows.row(at) if at < samples else None for at in positions]
        return build_rows(rows, seq_length=self.seq_length, eod_id=self.rows.eod_id)


class PromptLoader(RankLoader):
    """Prompts in the order of a cursor, dealt to ranks and micro-batches as rows are.

    Args:
        sources: what every source of the order is read from; of one tokenizer.
    """

    def __init__(
        self,
        sources: Mapping[str, Prompts],
        *,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        super().__init__(
            seq_length=next(iter(sources.values())).seq_length,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
        )
        self.sources = sources

    def micro_batches(self, cursor: Cursor, global_batch_size: int) -> Iterator[list[tuple[int, Prompt]]]:
        """This rank's (position, prompt) of the step that begins at ``cursor``, micro-batch by micro-batch.

        A position in the order names a sample of the run whatever the layout: what a generator's random numbers are
        keyed by.

        Raises:
            ConfigError: the global batch does not divide; raised here, before the first prompt is read.
        """
        count = self.num_micro_batches(global_batch_size)
        return (self._prompts(cursor, micro_batch) for micro_batch in range(count))

    def _prompts(self, cursor: Cursor, micro_batch: int) -> list[tuple[int, Prompt]]:
        found = [(at, cursor.order.sample_id(at)) for at in self.positions(micro_batch, cursor.consumed_samples)]
        return [(at, self.sources[sample.source].prompt(sample.index)) for at, sample in found]
