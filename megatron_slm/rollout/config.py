"""How completions are drawn while a model is trained on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_slm.config.option import option


class GapLimits(NamedTuple):
    """Differences of a token's log-probability, in nats, above which a rollout is refused."""

    largest: float
    mean: float


FP32_LIMITS, BF16_LIMITS = GapLimits(1e-2, 1e-5), GapLimits(0.5, 0.02)
"""What rounding explains. In fp32 tokens are 2e-7 apart on average, and some are badly conditioned: 1.4e-4 was seen in
a small model, whose training forward was itself 3e-5 from float64."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """The ``rollout`` section: generation inside PPO, GRPO and on-policy distillation."""

    prompts: int | None = option(
        None,
        "prompts answered before the policy learns from any of them, a multiple of train.global_batch_size, which is "
        "the prompts of one step; default as many",
        minimum=1,
        flag="rollout-prompts",
    )
    max_new_tokens: int = option(
        64,
        "tokens of a completion at most, the one that ends it included",
        minimum=1,
        flag="rollout-max-new-tokens",
    )
    sampling_temperature: float = option(1.0, "the logits are divided by it", above=0.0)
    top_k: int = option(
        0,
        "draw among so many likeliest tokens, which are recorded with every token; 0 is all",
        minimum=0,
        flag="rollout-top-k",
    )
    top_p: float = option(
        1.0,
        "draw among the likeliest tokens of this probability in all, which are recorded; 1 is all",
        above=0.0,
        maximum=1.0,
        flag="rollout-top-p",
    )
    sampling_seed: int = option(
        1234,
        "of the draws, which depend on it, the step, the sample and the position alone",
        minimum=0,
    )
    stop_tokens: tuple[str, ...] = option(
        (),
        "special tokens that end a completion beside the one that ends a document, by name",
        flag="rollout-stop-tokens",
    )
    batch_size: int = option(
        16,
        "sequences that a model copy generates at a time; changes no draw",
        minimum=1,
        flag="rollout-batch-size",
    )
    rewards: tuple[str, ...] = option(
        (), "what an answer is worth: NAME=WEIGHT of verifiers; a prompt's own is named verifier"
    )
    watched: tuple[str, ...] = option((), "verifiers whose value is logged beside the reward, and not learned from")
    reward_model: str | None = option(
        None, "run or checkpoint of a reward model, whose number is a part of the reward named model"
    )
    reward_workers: int = option(2, "processes that judge answers, beside one rank of each model copy", minimum=1)
    reward_timeout_s: float = option(10.0, "seconds after which a verifier has failed on an answer", above=0.0)
    max_logprob_gap: float | None = option(
        None,
        "largest difference, in nats, between the log-probability a token was drawn with and the one that training "
        f"finds; above it the run stops. Default {FP32_LIMITS.largest}, with precision.bf16 {BF16_LIMITS.largest}",
        above=0.0,
    )
    max_mean_logprob_gap: float | None = option(
        None,
        "the same of the mean over a rollout's tokens, where other weights or another temperature show first. Default "
        f"{FP32_LIMITS.mean}, with precision.bf16 {BF16_LIMITS.mean}",
        above=0.0,
    )

    def gap_limits(self, *, bf16: bool) -> GapLimits:
        """The limits, or what rounding explains."""
        usual = BF16_LIMITS if bf16 else FP32_LIMITS
        return GapLimits(self.max_logprob_gap or usual.largest, self.max_mean_logprob_gap or usual.mean)
