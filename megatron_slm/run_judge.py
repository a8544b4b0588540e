"""Who judges the answers of a run: verifiers by name, and a reward model."""

from __future__ import annotations

from megatron_slm.errors import ConfigError
from megatron_slm.run_parts import Run
from megatron_slm.stages.experience import Judge


def judge_of(run: Run) -> tuple[Judge, tuple[str, ...]]:
    """Scores answers as ``rollout.rewards`` says, and the names of a score's parts.

    Raises:
        ConfigError: a verifier is not known.
    """
    raise ConfigError(f"stage = {run.resolved.config.stage}: rollout.rewards cannot be judged yet")
