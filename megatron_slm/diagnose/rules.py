"""The table of rules, and what comes out when a run is asked all of them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.diagnose import data_rules, layer_rules, loss_rules, policy_rules, preference_rules
from megatron_slm.diagnose.finding import Finding, Rule
from megatron_slm.diagnose.records import POLICY_STAGES, Records

RULES: tuple[Rule, ...] = (
    Rule("divergence", loss_rules.divergence, loss_rules.enough_steps),
    Rule("spike", loss_rules.spike, loss_rules.spikes_visible, ("pretrain", "sft", "reward", "dpo", "distill")),
    Rule("late-instability", loss_rules.late_instability, loss_rules.enough_for_halves),
    Rule("plateau", loss_rules.plateau, loss_rules.enough_for_quarters),
    Rule("dead-gradients", layer_rules.dead_gradients, layer_rules.measured),
    Rule(
        "likelihood-displacement",
        preference_rules.displacement,
        lambda records: records.lacks("logps/chosen_delta", "logps/chosen", "rewards/accuracies"),
        ("dpo",),
    ),
    Rule(
        "entropy-collapse",
        policy_rules.entropy_collapse,
        lambda records: records.lacks(policy_rules.POLICY_ENTROPY[records.stage], "reward"),
        POLICY_STAGES,
    ),
    Rule(
        "zero-variance-groups",
        policy_rules.zero_variance,
        lambda records: records.lacks("frac_reward_zero_std", "reward", steps=policy_rules.ZERO_STEPS),
        ("grpo",),
    ),
    Rule("kl-blow-up", policy_rules.kl_blow_up, policy_rules.kl_known, POLICY_STAGES),
    Rule("reward-hacking", policy_rules.reward_hacking, policy_rules.truth_known, POLICY_STAGES),
    Rule(
        "length-bias",
        policy_rules.length_bias,
        lambda records: records.lacks("completions/mean_length", "reward"),
        POLICY_STAGES,
    ),
    Rule("forgetting", preference_rules.forgetting, preference_rules.validated),
    Rule("data-order", data_rules.data_order, lambda records: ""),
    Rule(
        "generation-gap",
        policy_rules.generation_gap,
        lambda records: "" if records.errors else records.lacks("rollout/logp_diff_max", steps=1),
        POLICY_STAGES,
    ),
    Rule(
        "unscored-answers",
        policy_rules.unscored,
        lambda records: records.lacks("completions/unscored_ratio", steps=10),
        POLICY_STAGES,
    ),
    Rule("behind", data_rules.behind, data_rules.comparable),
)
"""In the order in which findings are reported: what makes the others pointless comes first."""


@dataclass(frozen=True)
class Diagnosis:
    """What the rules say of a run.

    Attributes:
        findings: what it has.
        sound: names of the rules that found nothing.
        unchecked: names of the rules whose records are missing, and what they need.
    """

    records: Records
    findings: tuple[Finding, ...]
    sound: tuple[str, ...]
    unchecked: tuple[tuple[str, str], ...]


def diagnose(records: Records) -> Diagnosis:
    """Ask every rule that belongs to the run's stage."""
    findings, sound, unchecked = [], [], []
    for rule in RULES:
        if rule.stages and records.stage not in rule.stages:
            continue
        if missing := rule.missing(records):
            unchecked.append((rule.name, missing))
        elif finding := rule.check(records):
            findings.append(finding)
        else:
            sound.append(rule.name)
    return Diagnosis(records, tuple(findings), tuple(sound), tuple(unchecked))
