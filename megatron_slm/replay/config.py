"""What a run records of itself, to be compared with another run and to be replayed."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.option import option


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Fingerprints of every step, in the run's ``replay/``."""

    level: str = option(
        "none",
        "what is recorded of a step: light (batch, random states, loss, gradients, optimizer, parameters), layer (and "
        "what attention, MLPs and layers put out, and its gradients) or op (and every operation of replay.op_steps)",
        choices=("none", "light", "layer", "op"),
        flag="record",
    )
    every: int = option(1, "steps between recorded steps", minimum=1)
    op_steps: tuple[str, ...] = option((), "steps whose every operation is recorded with replay.level=op")
    keep_batches: int = option(8, "newest steps whose batches are kept whole on every rank", minimum=0)
    keep_steps: int | None = option(
        None, "newest steps kept tensor by tensor, older ones as one digest a phase; default all", minimum=1
    )

    @property
    def records(self) -> bool:
        """Whether anything is recorded."""
        return self.level != "none"
