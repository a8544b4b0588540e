"""Where the run stands in its data, as it is stored in a checkpoint, and whether a resume would go on there."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

from megatron_slm.data.order import ORDER_VERSION, SampleOrder
from megatron_slm.errors import CheckpointError

PREVIEW_SAMPLES = 64
"""A stored cursor carries the digest of this many samples that come next."""

IDENTITY = {
    "dataset_digest": "the corpus has other tokens; point data.data_path at the corpus the run was started with",
    "tokenizer_hash": "the same ids mean other text; use the tokenizer the run was started with",
    "seed": "set data.data_seed (or train.seed) back",
    "seq_length": "samples are cut elsewhere; set model.seq_length back",
    "num_samples": "an epoch has another length; point data.data_path at the corpus the run was started with",
    "order_version": "this program shuffles differently; resume with the version that wrote the checkpoint",
}
"""Every field that decides which samples come next, with the remedy for a change. Batch sizes, ranks and the target
length are absent: they do not enter the order."""


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """The data position of a run.

    ``rolling_digest`` is a chain of blake2b over the ids of all consumed samples in global order: two runs with the
    same digest have trained on the same data in the same order, whatever their layouts and batch sizes.
    """

    consumed_samples: int
    dataset_digest: str
    seed: int
    seq_length: int
    num_samples: int
    order_version: int
    tokenizer_hash: str
    rolling_digest: str

    @staticmethod
    def start(order: SampleOrder, tokenizer_hash: str) -> Cursor:
        """The cursor of a run that has consumed nothing."""
        return Cursor(
            consumed_samples=0,
            dataset_digest=order.digest,
            seed=order.seed,
            seq_length=order.seq_length,
            num_samples=order.num_samples,
            order_version=ORDER_VERSION,
            tokenizer_hash=tokenizer_hash,
            rolling_digest=_digest(f"{order.digest} {order.seq_length}".encode()).hex(),
        )

    @property
    def order(self) -> SampleOrder:
        """The order this cursor moves along."""
        return SampleOrder(self.num_samples, self.seed, self.dataset_digest, self.seq_length)

    @property
    def epoch(self) -> int:
        """Complete passes over the corpus."""
        return self.consumed_samples // self.num_samples

    def advance(self, global_batch_size: int) -> Cursor:
        """The cursor after the next ``global_batch_size`` samples."""
        stop = self.consumed_samples + global_batch_size
        digest = _chain(self.order, self.consumed_samples, stop, bytes.fromhex(self.rolling_digest))
        return dataclasses.replace(self, consumed_samples=stop, rolling_digest=digest.hex())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the checkpoint, with the digest of the samples that come next."""
        return {**dataclasses.asdict(self), "next_samples_digest": self._preview()}

    @staticmethod
    def from_dict(stored: dict[str, Any]) -> Cursor:
        """The cursor that :meth:`to_dict` wrote.

        Raises:
            CheckpointError: fields are missing or unknown, or the samples that come next are not the stored ones.
        """
        names = {field.name for field in dataclasses.fields(Cursor)} | {"next_samples_digest"}
        if set(stored) != names:
            raise CheckpointError(
                f"The data cursor of the checkpoint is damaged: fields {sorted(set(stored) ^ names)} are missing or "
                "unknown. Resume from an earlier checkpoint."
            )
        values = dict(stored)
        expected = values.pop("next_samples_digest")
        cursor = Cursor(**values)
        # Another version has another order by definition; check_resume names that one.
        if cursor.order_version == ORDER_VERSION and cursor._preview() != expected:
            raise CheckpointError(
                f"The data cursor of the checkpoint contradicts itself: the {PREVIEW_SAMPLES} samples after "
                f"{cursor.consumed_samples} have the digest {cursor._preview()} here, but {expected} when saved. The "
                "cursor is damaged; resume from an earlier checkpoint."
            )
        return cursor

    def _preview(self) -> str:
        return _chain(self.order, self.consumed_samples, self.consumed_samples + PREVIEW_SAMPLES, b"").hex()


def check_resume(saved: Cursor, current: Cursor) -> None:
    """Refuse a resume whose next samples would not be those of the saved run.

    Args:
        saved: the cursor of the checkpoint.
        current: a cursor of the present configuration and corpus; its position does not matter.

    Raises:
        CheckpointError: names every field that changed, with both values.
    """
    changed = [name for name in IDENTITY if getattr(saved, name) != getattr(current, name)]
    if not changed:
        return
    lines = [
        f"  {name}: {getattr(saved, name)} in the checkpoint, {getattr(current, name)} now: {IDENTITY[name]}"
        for name in changed
    ]
    raise CheckpointError(
        f"The samples after {saved.consumed_samples} would not be those the saved run would have read next; samples "
        "already trained on would come again and others never:\n" + "\n".join(lines) + "\n"
        "To train these weights on other data on purpose, start a new run with checkpoint.pretrained_checkpoint."
    )


def _chain(order: SampleOrder, start: int, stop: int, digest: bytes) -> bytes:
    epochs, indices = order.sample_ids(start, stop)
    # One link per sample and not per batch, so that the digest does not depend on the global batch size.
    for epoch, index in zip(epochs.tolist(), indices.tolist(), strict=True):
        digest = _digest(digest + epoch.to_bytes(8, "little") + index.to_bytes(8, "little"))
    return digest


def _digest(message: bytes) -> bytes:
    return hashlib.blake2b(message, digest_size=16, person=b"mslm cursor").digest()
