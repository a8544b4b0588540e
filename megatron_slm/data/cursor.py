"""Where the run stands in its data, as it is stored in a checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_slm.data.mixture import MIXTURE_VERSION, MixtureOrder, Phase, Source
from megatron_slm.data.order import SampleOrder
from megatron_slm.errors import CheckpointError, DataError

PREVIEW_SAMPLES = 64
"""A stored cursor carries what its rolling digest will be after this many more samples."""


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """The data position of a run.

    Attributes:
        order: what comes at which position.
        consumed_samples: the position: samples trained on and passed over since the start of the run.
        skipped: ranges of positions that were passed over without training, ``(start, stop)`` in ascending order.
        rolling_digest: a chain of blake2b over the ids of all samples trained on, in global order: two runs with the
            same digest have trained on the same data in the same order, whatever their layouts and batch sizes.
    """

    order: MixtureOrder
    tokenizer_hash: str
    consumed_samples: int
    skipped: tuple[tuple[int, int], ...]
    rolling_digest: str

    @staticmethod
    def start(order: MixtureOrder, tokenizer_hash: str) -> Cursor:
        """The cursor of a run that has consumed nothing."""
        return Cursor(
            order=order,
            tokenizer_hash=tokenizer_hash,
            consumed_samples=0,
            skipped=(),
            rolling_digest=_digest(f"{order.seq_length}".encode()).hex(),
        )

    @property
    def seq_length(self) -> int:
        """Tokens of one sample."""
        return self.order.seq_length

    @property
    def skipped_samples(self) -> int:
        """Positions passed over without training."""
        return sum(stop - start for start, stop in self.skipped)

    @property
    def consumed_by_source(self) -> dict[str, int]:
        """Samples of each source before the position; those passed over are among them."""
        counts = self.order.counts(self.consumed_samples).tolist()
        return {source.name: count for source, count in zip(self.order.sources, counts, strict=True)}

    def advance(self, global_batch_size: int) -> Cursor:
        """The cursor after training on the next ``global_batch_size`` samples."""
        stop = self.consumed_samples + global_batch_size
        digest = _chain(self.order, self.consumed_samples, stop, bytes.fromhex(self.rolling_digest))
        return dataclasses.replace(self, consumed_samples=stop, rolling_digest=digest.hex())

    def skip(self, samples: int) -> Cursor:
        """The cursor after passing over the next ``samples`` without training on them."""
        if not samples:
            return self
        start, stop = self.consumed_samples, self.consumed_samples + samples
        earlier = self.skipped
        if earlier and earlier[-1][1] == start:
            start, earlier = earlier[-1][0], earlier[:-1]
        return dataclasses.replace(self, consumed_samples=stop, skipped=(*earlier, (start, stop)))

    def with_phase(self, weights: Mapping[str, Fraction]) -> Cursor:
        """The cursor of a run that decides itself which shares hold from here on, until a configured phase."""
        phase = Phase.of(self.consumed_samples, weights, adaptive=True)
        if phase.parts == self.order.phase_at(self.consumed_samples).parts:
            return self
        return dataclasses.replace(self, order=self.order.with_phase(phase))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the checkpoint, with the digest of the samples that come next."""
        return {
            "order_version": MIXTURE_VERSION,
            "tokenizer_hash": self.tokenizer_hash,
            "seq_length": self.order.seq_length,
            "sources": [
                {
                    "name": source.name,
                    "dataset_digest": source.order.digest,
                    "num_samples": source.order.num_samples,
                    "seed": source.order.seed,
                }
                for source in self.order.sources
            ],
            "phases": [
                {"start": phase.start, "parts": dict(phase.parts), "adaptive": phase.adaptive}
                for phase in self.order.phases
            ],
            "consumed_samples": self.consumed_samples,
            "consumed_by_source": self.consumed_by_source,
            "skipped": [list(bounds) for bounds in self.skipped],
            "rolling_digest": self.rolling_digest,
            "next_samples_digest": self._preview(),
        }

    @staticmethod
    def from_dict(stored: dict[str, Any]) -> Cursor:
        """The cursor that :meth:`to_dict` wrote.

        Raises:
            CheckpointError: another version wrote it, fields are missing, unknown or of a wrong kind, or the samples
                that come next are not the stored ones.
        """
        version = stored.get("order_version")
        if version != MIXTURE_VERSION:
            raise CheckpointError(
                f"order_version: {version} in the checkpoint, {MIXTURE_VERSION} now: this program reads its data in "
                "another order; resume with the version that wrote the checkpoint, or take its weights alone with "
                "checkpoint.pretrained_checkpoint."
            )
        try:
            cursor = _read(stored)
            found = cursor.to_dict()
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError, OverflowError, DataError) as error:
            raise CheckpointError(
                f"The data cursor of the checkpoint is damaged ({error!r}). Resume from an earlier checkpoint."
            ) from error
        wrong = sorted(key for key in {*found, *stored} if found.get(key) != stored.get(key))
        if wrong:
            there, here = (", ".join(f"{key} {fields.get(key)}" for key in wrong) for fields in (stored, found))
            raise CheckpointError(
                f"The data cursor of the checkpoint contradicts itself: it says {there}, but after "
                f"{cursor.consumed_samples} samples of its sources and phases it is {here} (next_samples_digest is of "
                f"{PREVIEW_SAMPLES} samples). The cursor is damaged; resume from an earlier checkpoint."
            )
        return cursor

    def _preview(self) -> str:
        stop = self.consumed_samples + PREVIEW_SAMPLES
        return _chain(self.order, self.consumed_samples, stop, bytes.fromhex(self.rolling_digest)).hex()


def _read(stored: dict[str, Any]) -> Cursor:
    """The cursor as the fields say, before anything is compared."""
    length = stored["seq_length"]
    sources = tuple(
        Source(one["name"], SampleOrder(one["num_samples"], one["seed"], one["dataset_digest"], length))
        for one in stored["sources"]
    )
    phases = tuple(
        Phase(one["start"], tuple(sorted(one["parts"].items())), one["adaptive"]) for one in stored["phases"]
    )
    return Cursor(
        order=MixtureOrder(sources, phases),
        tokenizer_hash=stored["tokenizer_hash"],
        consumed_samples=stored["consumed_samples"],
        skipped=tuple((start, stop) for start, stop in stored["skipped"]),
        rolling_digest=stored["rolling_digest"],
    )


def _chain(order: MixtureOrder, start: int, stop: int, digest: bytes) -> bytes:
    keys = [_digest(source.order.digest.encode()) for source in order.sources]
    ids = (part.tolist() for part in order.sample_ids(start, stop))
    # One link per sample and not per batch, so that the digest does not depend on the global batch size.
    for number, epoch, index in zip(*ids, strict=True):
        digest = _digest(digest + keys[number] + epoch.to_bytes(8, "little") + index.to_bytes(8, "little"))
    return digest


def _digest(message: bytes) -> bytes:
    return hashlib.blake2b(message, digest_size=16, person=b"mslm cursor").digest()
