"""The batches of one data-parallel rank: which positions of the global order it reads, and when.

With micro-batch size m and D data-parallel ranks, micro-batch k of rank d holds the positions
``consumed + k*m*D + d*m + [0, m)``: the union over ranks and micro-batches is the next global batch, whatever m and D
are. Batches are sliced from the memory map when they are asked for; there is no worker, no queue and no state to save.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_slm.config import mixture_text
from megatron_slm.data.batch import Batch, Samples, build_batch, build_samples
from megatron_slm.data.config import DataConfig
from megatron_slm.data.corpus import Corpus
from megatron_slm.data.cursor import Cursor
from megatron_slm.errors import ConfigError, DataError


def positions_of(
    micro_batch: int, *, consumed_samples: int, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> range:
    """Positions that one rank reads for its micro-batch number ``micro_batch`` (from 0) of a step."""
    start = consumed_samples + (micro_batch * data_parallel_size + data_parallel_rank) * micro_batch_size
    return range(start, start + micro_batch_size)


class RankLoader:
    """What all loaders share: the shape of a micro-batch and the place of this rank."""

    def __init__(
        self,
        *,
        seq_length: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        assert 0 <= data_parallel_rank < data_parallel_size, (
            f"data-parallel rank {data_parallel_rank} is not one of {data_parallel_size}"
        )
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size

    def num_micro_batches(self, global_batch_size: int) -> int:
        """Micro-batches of one step on every rank.

        Raises:
            ConfigError: the global batch is not a multiple of micro-batch size x data-parallel size.
        """
        count, rest = divmod(global_batch_size, self.micro_batch_size * self.data_parallel_size)
        if rest or not count:
            raise ConfigError(
                f"train.global_batch_size {global_batch_size} is not a multiple of train.micro_batch_size "
                f"{self.micro_batch_size} x {self.data_parallel_size} data-parallel ranks. Change one of the three."
            )
        return count

    def positions(self, micro_batch: int, consumed_samples: int) -> range:
        """Positions of this rank's micro-batch of the step that begins after so many samples."""
        return positions_of(
            micro_batch,
            consumed_samples=consumed_samples,
            micro_batch_size=self.micro_batch_size,
            data_parallel_rank=self.data_parallel_rank,
            data_parallel_size=self.data_parallel_size,
        )


class TrainLoader(RankLoader):
    """Training samples in the order of a cursor. All tp, cp and pp ranks of one dp rank read the same batches.

    Args:
        corpora: what every source of the order is read from; of one tokenizer.
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
    ) -> None:
        super().__init__(
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
        )
        self.config = config
        self.corpora = corpora
        self.eod_id = next(iter(corpora.values())).eod_id
        self.windows = mixture_text.lengths(config.length_schedule)

    def micro_batches(self, cursor: Cursor, global_batch_size: int) -> Iterator[Batch]:
        """This rank's micro-batches of the step that begins at ``cursor``.

        Raises:
            ConfigError: the global batch does not divide; raised here, before the first batch is read.
        """
        count = self.num_micro_batches(global_batch_size)
        assert cursor.seq_length == self.seq_length, f"the order is for {cursor.seq_length} tokens"
        return (self._batch(cursor, micro_batch) for micro_batch in range(count))

    def _batch(self, cursor: Cursor, micro_batch: int) -> Batch:
        positions = self.positions(micro_batch, cursor.consumed_samples)
        return build_batch(
            self.corpora,
            cursor.order,
            positions,
            eod_id=self.eod_id,
            reset_attention_mask=self.config.reset_attention_mask,
            reset_position_ids=self.config.reset_position_ids,
            eod_mask_loss=self.config.eod_mask_loss,
            windows=[self._window(position) for position in positions] if self.windows else None,
        )

    def _window(self, position: int) -> int:
        """Tokens of a window at ``position``: short before long."""
        return next((tokens for start, tokens in reversed(self.windows) if start <= position), self.seq_length)


class ValidLoader(RankLoader):
    """The valid split in natural order: every validation reads the same first samples.

    Rule: the first ``min(eval_iters * global_batch_size, samples of the split)`` samples, each exactly once, dealt to
    ranks and micro-batches as in training. Slots that remain are filled with a sample whose loss mask is 0, so that the
    sum of the loss and its denominator are exactly those of the samples used.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        config: DataConfig,
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
        self.config = config
        self.corpus = corpus

    def num_samples(self, eval_iters: int, global_batch_size: int) -> int:
        """Samples that one validation uses.

        Raises:
            DataError: the split is too short for one sample.
        """
        available = self.corpus.num_samples(self.seq_length)
        if not available:
            raise DataError(
                f"{self.corpus.directory} has {self.corpus.num_tokens} tokens, too few for one sample of seq_length "
                f"{self.seq_length}. Prepare the corpus with a larger split, lower model.seq_length, or set "
                "train.eval_iters 0."
            )
        return min(eval_iters * global_batch_size, available)

    def steps(self, eval_iters: int, global_batch_size: int, *, multiple: int = 1) -> Iterator[list[Batch]]:
        """The micro-batches of this rank, step by step; every rank gets the same number of each.

        Args:
            multiple: the micro-batches of a step must be a multiple of this (the pipeline size, when interleaved). The
                last step is cut to the smallest such number that holds the samples left.

        Raises:
            ConfigError: the global batch does not divide.
            DataError: the split is too short for one sample.
        """
        per_step = self.num_micro_batches(global_batch_size)
        assert per_step % multiple == 0, f"{per_step} micro-batches of a step are not a multiple of {multiple}"
        samples = self.num_samples(eval_iters, global_batch_size)
        return self._steps(samples, per_step, multiple)

    def _steps(self, samples: int, per_step: int, multiple: int) -> Iterator[list[Batch]]:
        width = self.micro_batch_size * self.data_parallel_size
        for start in range(0, samples, per_step * width):
            needed = -(-(samples - start) // (width * multiple)) * multiple
            yield [self._batch(k, start, samples) for k in range(min(per_step, needed))]

    def _batch(self, micro_batch: int, start: int, samples: int) -> Batch:
        positions = self.positions(micro_batch, start)
        return build_samples(
            [self.corpus.sample(at, self.seq_length) if at < samples else None for at in positions],
            seq_length=self.seq_length,
            eod_id=self.corpus.eod_id,
            reset_attention_mask=self.config.reset_attention_mask,
            reset_position_ids=self.config.reset_position_ids,
            eod_mask_loss=self.config.eod_mask_loss,
        )
