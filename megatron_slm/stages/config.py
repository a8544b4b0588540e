"""What each stage after pretraining minimises. One section a stage; a run has the section of its own ``stage``.

Frameworks mean different things by one word. Where they do, a ``convention`` names the framework whose meaning is
taken, and every single choice can be made against it; docs/conventions.md is the table.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.option import option


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning: the labels that count are the assistant's."""

    sft_loss: str = option(
        "nll",
        "negative log-likelihood of the trained tokens, or dft: each times its own probability (arXiv 2508.05629)",
        choices=("nll", "dft"),
    )


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """A reward model from preference pairs: a scalar at the last token of each side."""

    reward_head_init_std: float = option(
        0.0, "standard deviation of the scalar head's initial weights; 0 starts with the loss ln 2", minimum=0.0
    )
    center_rewards_coefficient: float = option(
        0.01, "weight of the squared sum of a pair's rewards, which keeps them around 0 (arXiv 2312.09244)", minimum=0.0
    )
    reward_margin: bool = option(False, "subtract the pair's margin from the difference of its rewards")


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """Direct preference optimization: pairs, against the log-probabilities of a reference."""

    dpo_loss: str = option(
        "sigmoid",
        "sigmoid (DPO), sigmoid_norm (of log-ratios averaged over the tokens), ipo (averaged too, as TRL and the "
        "paper's authors do), robust (unbiased under flipped labels) or apo_zero",
        choices=("sigmoid", "sigmoid_norm", "ipo", "robust", "apo_zero"),
    )
    dpo_beta: float = option(0.1, "strength of the pull towards the reference; tau of IPO", above=0.0)
    dpo_label_smoothing: float = option(
        0.0,
        "share of pairs whose preference is taken to be flipped: smooths sigmoid and sigmoid_norm (cDPO), is the noise "
        "rate of robust",
        minimum=0.0,
        below=0.5,
    )
    dpo_sft_weight: float = option(
        0.0, "weight of the chosen side's mean negative log-likelihood, added to the loss", minimum=0.0
    )
    dpo_reference: str = option(
        "precomputed",
        "the reference's log-probabilities are computed once before training, or live by a frozen copy of the model",
        choices=("precomputed", "live"),
    )


@dataclass(frozen=True, kw_only=True)
class PpoConfig:
    """Proximal policy optimization: a policy and a critic, rewards with a price on leaving the reference."""

    ppo_convention: str = option(
        "trl",
        "whose details are taken: trl (0.11), verl (dual clip 3, log-ratio within 20) or torchtune (whitening adds the "
        "mean back)",
        choices=("trl", "verl", "torchtune"),
    )
    ppo_critic_lr: float | None = option(
        None,
        "peak learning rate of the critic, on the policy's schedule, or throughout where optimizer.lr is 0; default "
        "optimizer.lr",
        above=0.0,
    )
    ppo_critic_checkpoint: str | None = option(
        None,
        "run or checkpoint whose weights the critic begins with, a reward model's head included; default "
        "checkpoint.pretrained_checkpoint, with a head of zeros",
    )
    ppo_epochs: int = option(2, "times that each rollout is trained on", minimum=1)
    ppo_kl_coef: float = option(0.05, "reward taken away for one nat of distance from the reference", minimum=0.0)
    ppo_kl_estimator: str = option(
        "k1", "estimate of that distance from the sampled token: k1, k2, k3 or abs", choices=("k1", "k2", "k3", "abs")
    )
    ppo_kl_target: float | None = option(
        None, "distance in nats a sequence that ppo_kl_coef is steered to; default it stays as it is", above=0.0
    )
    ppo_kl_horizon: int = option(10000, "samples over which ppo_kl_coef may change by a fifth", minimum=1)
    ppo_gamma: float = option(1.0, "discount of a token's reward for each token before it", minimum=0.0, maximum=1.0)
    ppo_lambda: float = option(0.95, "lambda of the generalised advantage estimate", minimum=0.0, maximum=1.0)
    ppo_clip: float = option(0.2, "how far the policy's ratio may leave 1", above=0.0, below=1.0)
    ppo_dual_clip: float | None = option(
        None,
        "largest ratio that counts where the advantage is negative (arXiv 1912.09729), 0 for none; default the "
        "convention's",
        minimum=0.0,
    )
    ppo_value_clip: float = option(
        0.2,
        "how far a value may leave the one of the rollout before the critic's loss ignores it, 0 for any",
        minimum=0.0,
    )
    ppo_value_coef: float = option(0.5, "weight of the critic's loss", above=0.0)
    ppo_entropy_coef: float = option(0.0, "weight of the entropy, which is made larger", minimum=0.0)
    ppo_missing_eos_penalty: float = option(
        0.0, "taken from the score of a sample that did not end by itself", minimum=0.0
    )
    ppo_whiten_rewards: bool = option(False, "divide the rewards by their standard deviation over the step's tokens")
    ppo_whiten_advantages: bool = option(True, "scale the advantages over the step's tokens to variance 1")

    @property
    def dual_clip(self) -> float | None:
        """The bound on the ratio of a negative advantage; None without."""
        default = 3.0 if self.ppo_convention == "verl" else 0.0
        return (default if self.ppo_dual_clip is None else self.ppo_dual_clip) or None

    @property
    def log_ratio_limit(self) -> float | None:
        """Log-ratios are cut to this absolute value."""
        return 20.0 if self.ppo_convention == "verl" else None


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """Group-relative policy optimization: several samples a prompt, whose rewards are compared with each other."""

    grpo_convention: str = option(
        "trl",
        "whose details are taken: trl (1.16), verl (0.9), megatron (Megatron-LM's megatron/rl) or nemo_rl; they differ "
        "in the standard deviation, the KL term, the clips of cispo, and the dual clip",
        choices=("trl", "verl", "megatron", "nemo_rl"),
    )
    grpo_loss: str = option(
        "dapo",
        "dapo (mean over tokens), grpo (mean over sequences of their means), dr_grpo (sums over a constant length), "
        "gspo (one ratio a sequence) or cispo (clipped weights without gradient)",
        choices=("dapo", "grpo", "dr_grpo", "gspo", "cispo"),
    )
    grpo_group_size: int = option(16, "samples drawn for each prompt", minimum=2)
    grpo_iterations: int = option(1, "times that each rollout is trained on", minimum=1)
    grpo_clamp_eps_lower: float = option(0.2, "how far the ratio may fall below 1", above=0.0, below=1.0)
    grpo_clamp_eps_upper: float | None = option(
        None,
        "how far the ratio may rise above 1; default grpo_clamp_eps_lower. With cispo in the convention trl it is the "
        "largest ratio itself, default 5",
        above=0.0,
    )
    grpo_dual_clip: float | None = option(
        None,
        "largest ratio that counts where the advantage is negative (arXiv 1912.09729, TRL's delta), 0 for none; "
        "default the convention's",
        minimum=0.0,
    )
    grpo_completion_length: int | None = option(
        None, "tokens that dr_grpo divides a sequence's sum by; default the most that a rollout may draw", minimum=1
    )
    grpo_kl_beta: float = option(0.0, "weight of the distance from the reference", minimum=0.0)
    grpo_kl_estimator: str = option(
        "k3",
        "estimate of that distance from the sampled token; the gradient of k1 alone has mean 0",
        choices=("k3", "k1"),
    )
    grpo_kl_bias_correction: bool | None = option(
        None, "multiply that distance by the ratio (arXiv 2512.02556); default the convention's, true for trl alone"
    )
    grpo_entropy_coef: float = option(0.0, "weight of the entropy, which is made larger", minimum=0.0)
    grpo_baseline: str | None = option(
        None,
        "what a reward is compared with: the group's mean, or the mean of the others (RLOO, arXiv 2402.14740); default "
        "the convention's, leave_one_out for nemo_rl alone",
        choices=("mean", "leave_one_out"),
    )
    grpo_scale: str = option(
        "group",
        "the standard deviation that advantages are divided by: the group's, the whole step's, or none (Dr. GRPO)",
        choices=("group", "batch", "none"),
    )
    grpo_drop_zero_std: bool = option(False, "leave out prompts whose samples all have the same reward")
    grpo_mask_truncated: bool = option(False, "leave out samples that did not end by themselves")
    grpo_is_correction: str = option(
        "none",
        "weight for what generation and training say of one sample: by token or sequence, cut (truncate) or left out "
        "(mask) beyond grpo_is_cap",
        choices=("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    )
    grpo_is_cap: float = option(3.0, "largest such weight", above=0.0)

    @property
    def ratio_upper(self) -> float:
        """The largest ratio that the clip lets pass."""
        if self.grpo_loss == "cispo" and self.grpo_convention == "trl":
            return self.grpo_clamp_eps_upper or 5.0
        return 1.0 + (self.grpo_clamp_eps_upper or self.grpo_clamp_eps_lower)

    @property
    def ratio_lower(self) -> float:
        """The smallest ratio that the clip lets pass; TRL's cispo has none."""
        if self.grpo_loss == "cispo" and self.grpo_convention == "trl":
            return 0.0
        return 1.0 - self.grpo_clamp_eps_lower

    @property
    def dual_clip(self) -> float | None:
        """The bound on the ratio of a negative advantage; None without."""
        by_token = self.grpo_loss in ("dapo", "grpo", "dr_grpo")
        default = 3.0 if self.grpo_convention == "verl" and by_token else 0.0
        return (default if self.grpo_dual_clip is None else self.grpo_dual_clip) or None

    @property
    def kl_bias_correction(self) -> bool:
        """Whether the KL term carries the ratio."""
        default = self.grpo_convention == "trl"
        return default if self.grpo_kl_bias_correction is None else self.grpo_kl_bias_correction

    @property
    def bounded_kl(self) -> bool:
        """Whether k3 takes log-ratios within 20 only and stays within 10."""
        return self.grpo_convention in ("verl", "nemo_rl")

    @property
    def log_ratio_limit(self) -> float | None:
        """Log-ratios of tokens are cut to this absolute value."""
        return 20.0 if self.grpo_convention == "verl" and self.grpo_loss != "gspo" else None

    @property
    def baseline(self) -> str:
        """mean or leave_one_out."""
        return self.grpo_baseline or ("leave_one_out" if self.grpo_convention == "nemo_rl" else "mean")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation: a student follows a teacher's next-token distribution."""

    distill_beta: float = option(
        0.0,
        "0 forward KL(teacher, student), 1 reverse KL(student, teacher), between generalised JSD (arXiv 2306.13649)",
        minimum=0.0,
        maximum=1.0,
    )
    distill_teacher: str | None = option(
        None,
        "run or checkpoint of the teacher: the same tokenizer, any size; with teacher_topk the directory that `mslm "
        "data teacher` wrote",
    )
    distill_temperature: float = option(1.0, "divides the logits of both", above=0.0)
    distill_on_policy_fraction: float = option(
        0.0, "share of the samples that the student draws itself", minimum=0.0, maximum=1.0
    )
    distill_ce_weight: float = option(
        0.0, "share of the labels' cross-entropy in the loss; the divergence has the rest", minimum=0.0, maximum=1.0
    )
    teacher_topk: int | None = option(
        None, "most probable tokens of a stored teacher that are compared; default the teacher runs", minimum=1
    )
    teacher_tail: str = option(
        "bucket",
        "what lies outside a stored teacher's tokens: one more token (bucket), so that the divergence is a lower bound "
        "of the whole one, or nothing (ignore)",
        choices=("bucket", "ignore"),
    )
