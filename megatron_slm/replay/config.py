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
    batches_of: str | None = option(
        None,
        "replay/ of a run whose kept batches are read instead of the corpora; mslm replay sets it where those are gone",
    )
    whole_steps: int = option(
        0, "first steps whose weights, module outputs and gradients are kept as numbers: large", minimum=0
    )
    keep_steps: int | None = option(
        None, "newest steps kept tensor by tensor, older ones as one digest a phase; default all", minimum=1
    )

    sdc_every: int | None = option(
        None,
        "steps between steps whose forward and backward is made twice and compared; default none",
        minimum=1,
        flag="sdc-every",
    )
    on_fault: str = option(
        "stop",
        "what is done about a transient fault that replay.sdc_every finds: stop, or continue with what two of three "
        "passes gave",
        choices=("stop", "continue"),
    )

    @property
    def records(self) -> bool:
        """Whether anything is recorded."""
        return self.level != "none"
