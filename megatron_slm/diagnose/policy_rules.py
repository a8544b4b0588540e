"""Rules of runs that learn from their own answers: what the reward rewards, and whether there is still a signal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_slm.diagnose.finding import Finding
from megatron_slm.diagnose.records import FEWEST_STEPS, Records, Series
from megatron_slm.diagnose.robust import change, differences, median, rank_correlation
from megatron_slm.rollout.config import BF16_LIMITS, FP32_LIMITS

PROXY_GAIN, TRUTH_GAIN = 0.1, 0.02
"""Of rewards between 0 and 1, by quarters of a run: a reward model that was exploited rose by 0.31 while the truth
moved by 0.001; sound runs raised both by 0.3 and more."""
PROXY_ERRORS, CEILING = 3.0, 0.95
"""Standard errors of that gain: five rollouts of few groups tell little. A truth at 0.95, or held-out answers that are
better than those learned from (they are greedy), could not have risen with it."""
HELD_OUT = "held-out prompts"
COLLAPSED_ENTROPY, ZERO_ENTROPY = 0.2, 0.01
"""Of the beginning's, and in nats a token: at 0.01 a hundred tokens leave one choice open. A GRPO run that a rate of
1e-3 had spoilt stood at 0.15 of it."""
ZERO_SHARE, ZERO_STEPS = 0.8, 10
"""Groups without a difference. At 0.8 four fifths of what was generated teach nothing; one step may be bad luck with
16 groups, ten in a row are not."""
SEQUENCE_KL, TOKEN_KL = 3.0, 0.05
"""Nats. Sound runs with answers of seven tokens ended at 2 a sequence, one that exploited its reward model at 3.9.
Longer answers may go as far a token as 60 of them that reach 3."""
RISING_ERRORS, RISING = 2.0, 0.05
"""Standard errors of the difference of the last two quarters, and of the distance: one that has settled moves less."""
LONGER, CUT_OFF = 1.5, 0.1
"""Times the length of the beginning, and more of the answers cut off: beyond what a changed style explains."""
PAID_BY_LENGTH = 0.5
"""Rank correlation of the changes of length and reward from step to step; of 30 steps without a connection it is
beyond 0.46 in one of 200 runs."""
BEGINNING = 5
"""Steps that tell how a run began: rates far too high have done their work before the first quarter is over."""
GAP_SHARE = 0.5
"""Of the largest difference that rounding explains: it grows by powers of two long before it stops the run."""
UNSCORED = 0.05
"""Answers without a reward. They are left out, so what is trained on is no longer what was asked."""

POLICY_ENTROPY = {"grpo": "entropy", "ppo": "policy/entropy"}


def truths(records: Records) -> list[tuple[str, Series]]:
    """What is measured beside the reward and not learned from: ``rollout.watched``, or held-out answers."""
    names = [str(name).rpartition(":")[2] for name in records.setting("rollout.watched", ())]
    found = [(name, records.series(f"rewards/{name}/mean")) for name in names]
    found = [(name, series) for name, series in found if len(series.values) >= FEWEST_STEPS]
    if found:
        return found
    held = records.held_out("reward")
    return [(HELD_OUT, held)] if len(held.values) >= 4 else []


def truth_known(records: Records) -> str:
    """What the rule about reward hacking needs."""
    if lacking := records.lacks("reward"):
        return lacking
    return "" if truths(records) else "needs rollout.watched (a verifier beside the reward), or 4 validations"


def reward_hacking(records: Records) -> Finding | None:
    """The reward rises and what it stands for does not."""
    reward = records.series("reward")
    late = reward.quarter(3)
    for name, truth in truths(records):
        ceiling = median(late) if name == HELD_OUT else CEILING
        if median(truth.quarter(3)) >= ceiling:
            continue
        for first, second in zip(_starts(reward), _starts(truth), strict=True):
            gain = change(first.values, late)
            real = gain.gain > PROXY_GAIN and gain.errors > PROXY_ERRORS
            if real and median(truth.quarter(3)) - median(second.values) < TRUTH_GAIN:
                return _hacked(records, name, truth, first.steps[0])
    return None


def _starts(series: Series) -> list[Series]:
    """From where on a gain is counted: the beginning of the run, the second and the third quarter."""
    size = len(series.values)
    return [
        Series(series.steps[at : at + BEGINNING], series.values[at : at + BEGINNING])
        if at == 0
        else Series(series.steps[at : at + size // 4], series.values[at : at + size // 4])
        for at in (0, size // 4, size // 2)
    ]


def _hacked(records: Records, name: str, truth: Series, step: int) -> Finding:
    reward = records.series("reward")
    by_quarter = [", ".join(f"{median(series.quarter(at)):.3f}" for at in range(4)) for series in (reward, truth)]
    kl = records.series("objective/kl")
    return Finding(
        name="reward-hacking",
        summary=f"the reward rises, {name} does not",
        step=step,
        evidence=(
            f"reward, median by quarter of the run: {by_quarter[0]}",
            f"{name}: {by_quarter[1]}",
            *([f"sequence KL {median(kl.quarter(3)):.2f} nats in the last quarter"] if len(kl.values) > 3 else []),
        ),
        causes=(
            "the reward model knows only answers unlike those the policy has found: it was trained on others",
            "a part of the reward can be had without the task (a format, a length)",
            "the price of distance from the reference is too low (ppo.ppo_kl_coef, grpo.grpo_kl_beta)",
            "too many steps against one reward model",
        ),
        intervention="Stop, take the checkpoint before the truth stood still, and train the reward model on pairs of "
        "this policy's answers; raising ppo.ppo_kl_coef fivefold only slows it down.",
    )


def entropy_collapse(records: Records) -> Finding | None:
    """The policy has one answer left, and did not become good by it."""
    entropy = records.series(POLICY_ENTROPY[records.stage])
    # The first step's answers are those of the untrained policy.
    early, late = entropy.values[0], median(entropy.quarter(3))
    if late > max(COLLAPSED_ENTROPY * early, ZERO_ENTROPY) or early <= ZERO_ENTROPY:
        return None
    low = [value <= max(COLLAPSED_ENTROPY * early, ZERO_ENTROPY) for value in entropy.values]
    reward = records.series("reward")
    began = reward.values[0]
    if median(reward.quarter(3)) - began > PROXY_GAIN:
        return None  # sure, and better than before: that is what was wanted
    step = next(step for step, out in zip(entropy.steps, low, strict=True) if out)
    return Finding(
        name="entropy-collapse",
        summary="the policy gives one answer, and not a better one",
        step=step,
        evidence=(
            f"entropy of a token: {early:.3g} nats at step {entropy.steps[0]}, {late:.3g} in the last quarter",
            f"reward: {began:.3f} at step {reward.steps[0]}, {median(reward.quarter(3)):.3f} in the last quarter",
        ),
        causes=(
            "the learning rate is too high for learning from rewards",
            "a small part of the reward is easy and was taken first (format)",
            "no entropy bonus, no distance to the reference",
            "the upper clip is too narrow for unlikely tokens to grow (grpo.grpo_clamp_eps_upper)",
        ),
        intervention="Go back to the newest checkpoint before that step and divide optimizer.lr by three.",
    )


def zero_variance(records: Records) -> Finding | None:
    """Nearly all groups have equal rewards, so there is nothing to compare."""
    shares = records.series("frac_reward_zero_std")
    run, longest = 0, 0
    first = ended = 0
    for step, share in zip(shares.steps, shares.values, strict=True):
        run = run + 1 if share > ZERO_SHARE else 0
        if run == ZERO_STEPS and not first:
            first = step
        if run > longest:
            longest, ended = run, step
    if longest < ZERO_STEPS:
        return None
    reward = records.series("reward").tail(longest)
    solved = records.series("reward").values and median(reward.values) >= 0.95 * max(records.series("reward").values)
    causes = [
        "the policy has collapsed to one answer (see entropy-collapse)",
        "the prompts are too hard: no sample of a group is right",
        "the prompts are too easy, or used up: every sample is right",
        "the reward has too few values, or a part of it that everybody gets",
    ]
    if solved and median(reward.values) > 0.9:
        causes.insert(0, causes.pop(2))
    return Finding(
        name="zero-variance-groups",
        summary="groups of answers have equal rewards: there is no signal",
        step=first - ZERO_STEPS + 1,
        evidence=(
            f"frac_reward_zero_std above {ZERO_SHARE} in {longest} steps in a row, up to step {ended}; "
            f"{median(shares.tail(ZERO_STEPS).values):.2f} at the end",
            f"reward, median of the last {len(reward.values)} steps: {median(reward.values or [0.0]):.3f}",
        ),
        causes=tuple(causes),
        intervention="Look at some answers (mslm generate RUN --prompt TEXT). Equal and wrong: go back before that "
        "step with a third of the learning rate. All right: the prompts are done, take harder ones.",
    )


def kl_known(records: Records) -> str:
    """What the rule about the distance from the reference needs."""
    if not records.lacks("objective/kl") or not records.lacks("kl", "completions/mean_length"):
        return ""
    key = "ppo.ppo_kl_coef" if records.stage == "ppo" else "grpo.grpo_kl_beta"
    if records.setting(key, 0.0) > 0.0:
        names = ("objective/kl",) if records.stage == "ppo" else ("kl", "completions/mean_length")
        return records.lacks(*names)
    return f"needs a reference: {key} above 0"


def kl_blow_up(records: Records) -> Finding | None:
    """The policy is far from where it started, and goes on."""
    kl = _sequence_kl(records)
    lengths = records.series("completions/mean_length")
    limit = max(SEQUENCE_KL, TOKEN_KL * median(lengths.quarter(3) or [0.0]))
    rising = change(kl.quarter(2), kl.quarter(3))
    if rising.late <= limit or rising.errors <= RISING_ERRORS or rising.gain < RISING * rising.late:
        return None
    return Finding(
        name="kl-blow-up",
        summary="the policy leaves its reference and does not stop",
        step=next(step for step, value in zip(kl.steps, kl.values, strict=True) if value > limit),
        evidence=(
            f"KL of a sequence, median by quarter: {', '.join(f'{median(kl.quarter(at)):.2f}' for at in range(4))} "
            f"nats; limit {limit:.2f}",
            f"it rose by {rising.gain:.2f} from the third quarter to the last, {rising.errors:.1f} standard errors",
        ),
        causes=(
            "the price of the distance is too low (ppo.ppo_kl_coef, grpo.grpo_kl_beta)",
            "the learning rate is too high, or a rollout is trained on too often (ppo.ppo_epochs)",
            "the reward is exploited (see reward-hacking)",
        ),
        intervention="Set ppo.ppo_kl_target (the price then follows), or double the price, from the newest checkpoint "
        "below the limit.",
    )


def _sequence_kl(records: Records) -> Series:
    """Nats a sequence; GRPO logs them a token."""
    whole = records.series("objective/kl")
    if whole.values:
        return whole
    rows = [(r["step"], r["kl"] * r["completions/mean_length"]) for r in records.applied if _both(r)]
    return Series([step for step, _ in rows], [value for _, value in rows])


def _both(record: Mapping[str, Any]) -> bool:
    return record.get("kl") is not None and record.get("completions/mean_length") is not None


def length_bias(records: Records) -> Finding | None:
    """Answers become longer because length pays."""
    length, reward = records.series("completions/mean_length"), records.series("reward")
    grown = change(length.values[:BEGINNING], length.quarter(3))
    if grown.late < LONGER * grown.early or grown.errors < 3.0:
        return None
    evidence = []
    cut = records.series("completions/clipped_ratio")
    if len(cut.values) >= FEWEST_STEPS:
        more = change(cut.quarter(0), cut.quarter(3))
        if more.gain > CUT_OFF:
            evidence.append(f"cut off at rollout.max_new_tokens: {more.early:.0%} to {more.late:.0%}")
    paid = rank_correlation(differences(length.values), differences(reward.values))
    if len(length.values) == len(reward.values) >= 30 and paid > PAID_BY_LENGTH:
        evidence.append(f"from step to step length and reward move together: rank correlation {paid:.2f}")
    for name, truth in truths(records):
        gain = median(truth.quarter(3)) - median(truth.quarter(0))
        if gain < TRUTH_GAIN:
            evidence.append(f"{name} does not move: {gain:+.3f}")
    if not evidence:
        return None
    rewards = change(reward.quarter(0), reward.quarter(3))
    return Finding(
        name="length-bias",
        summary="answers grow longer and not better",
        step=next(step for step, v in zip(length.steps, length.values, strict=True) if v >= LONGER * grown.early),
        evidence=(
            f"tokens of an answer, median: {grown.early:.1f} at first, {grown.late:.1f} in the last quarter; reward "
            f"{rewards.early:.3f} to {rewards.late:.3f}",
            *evidence,
        ),
        causes=(
            "the reward model prefers long answers: in its pairs the chosen ones are longer",
            "losses averaged over a sequence dilute what is wrong in a long answer (grpo.grpo_loss=grpo)",
            "nothing ends an answer: no missing-end penalty, no stop token",
        ),
        intervention="Use grpo.grpo_loss=dapo or dr_grpo, or ppo.ppo_missing_eos_penalty; balance the lengths in the "
        "reward model's pairs.",
    )


def generation_gap(records: Records) -> Finding | None:
    """Generation and training do not agree on the probability of the same token."""
    largest, mean = records.series("rollout/logp_diff_max"), records.series("rollout/logp_diff_mean")
    limits = BF16_LIMITS if records.setting("precision.bf16", False) else FP32_LIMITS
    limit = GAP_SHARE * limits.largest
    evidence = []
    if largest.values and median(largest.tail(10).values) > limit:
        evidence.append(
            f"largest difference of a token, median of the last {len(largest.tail(10).values)} rollouts: "
            f"{median(largest.tail(10).values):.3g} nats (rounding explains {limit / GAP_SHARE:g}); in the first "
            f"{median(largest.values[:10]):.3g}"
        )
    if mean.values and median(mean.tail(10).values) > GAP_SHARE * limits.mean:
        evidence.append(f"mean of a token {median(mean.tail(10).values):.3g} nats; rounding explains {limits.mean:g}")
    stopped = [error for error in records.errors if "between generation and training" in error]
    evidence += [f"the run ended with: {error[:300]}" for error in stopped[-1:]]
    if not evidence:
        return None
    far = [step for step, value in zip(largest.steps, largest.values, strict=True) if value > limit]
    return Finding(
        name="generation-gap",
        summary="what was sampled is not what is trained",
        step=far[0] if far else records.steps[-1]["step"],
        evidence=tuple(evidence),
        causes=(
            "weights changed between generating and training (a hook, a restart inside a rollout by other code)",
            "another temperature, kept set or vocabulary in one of the two",
            "a key-value cache or kernel that rounds differently, in bf16",
            "an expert router that chooses otherwise for a batch of another size",
        ),
        intervention="Stop. Compare generation and training of the newest checkpoint with rollout.max_logprob_gap=1e-4 "
        "in fp32; if that is quiet, correct in bf16 with grpo.grpo_is_correction=token_truncate.",
    )


def unscored(records: Records) -> Finding | None:
    """Answers that the reward could not judge."""
    share = records.series("completions/unscored_ratio")
    worst = [sum(share.values[at : at + 10]) / 10 for at in range(max(0, len(share.values) - 9))]
    if not worst or max(worst) <= UNSCORED:
        return None
    at = next(number for number, value in enumerate(worst) if value > UNSCORED)
    return Finding(
        name="unscored-answers",
        summary="answers could not be scored and were left out",
        step=share.steps[at],
        evidence=(
            f"completions/unscored_ratio: up to {max(worst):.1%} in ten steps, {median(share.tail(10).values):.1%} at "
            "the end",
        ),
        causes=(
            "a verifier raises or hangs: log.txt holds the first cause",
            "rollout.reward_timeout_s is too short for this machine's load",
            "answers that the verifier does not expect (empty, cut off)",
        ),
        intervention="Read the first cause in log.txt, mend the verifier to return 0 for such an answer, and resume.",
    )
