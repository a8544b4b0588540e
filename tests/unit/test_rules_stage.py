"""Options of a stage after pretraining that another one leaves without effect: each is refused, with its way out."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_slm.config.load import load
from megatron_slm.config.rules import violations
from megatron_slm.errors import DataError
from megatron_slm.run_examples import require_margins

START = "checkpoint.pretrained_checkpoint=runs/sft"
REWARD = "rollout.rewards=exact_match=1"

IDLE = [
    ("dpo", "dpo.dpo_label_smoothing=0.1", "dpo.dpo_loss=ipo", "dpo.dpo_loss=sigmoid"),
    ("dpo", "dpo.dpo_label_smoothing=0.1", "dpo.dpo_loss=apo_zero", "dpo.dpo_loss=robust"),
    ("ppo", "ppo.ppo_kl_target=2", "ppo.ppo_kl_coef=0", "ppo.ppo_kl_coef=0.1"),
    ("ppo", "ppo.ppo_kl_horizon=500", "ppo.ppo_kl_target=null", "ppo.ppo_kl_target=2"),
    ("grpo", "grpo.grpo_completion_length=32", "grpo.grpo_loss=dapo", "grpo.grpo_loss=dr_grpo"),
    ("grpo", "grpo.grpo_is_cap=2", "grpo.grpo_is_correction=none", "grpo.grpo_is_correction=token_mask"),
    ("grpo", "grpo.grpo_kl_estimator=k1", "grpo.grpo_kl_beta=0", "grpo.grpo_kl_beta=0.1"),
    ("distill", "distill.teacher_tail=ignore", "distill.teacher_topk=null", "distill.teacher_topk=8"),
    (
        "distill",
        "rollout.max_new_tokens=32",
        "distill.distill_on_policy_fraction=0",
        "distill.distill_on_policy_fraction=0.5",
    ),
]


def found(stage: str, *overrides: str) -> list[str]:
    own = {
        "dpo": [START],
        "ppo": [START, REWARD],
        "grpo": [START, REWARD],
        "distill": ["distill.distill_teacher=runs/t"],
    }
    resolved = load(None, [f"stage={stage}", *own.get(stage, []), *overrides])
    return violations(resolved.config, provenance=resolved.provenance)


@pytest.mark.parametrize(("stage", "given", "other", "mended"), IDLE)
def test_an_option_without_effect_is_refused(stage: str, given: str, other: str, mended: str) -> None:
    (said,) = found(stage, given, other)
    for each in (given, other):
        assert each.split("=")[0] in said
    assert "Set " in said and "leave " in said and "\n" not in said
    assert found(stage, given, mended) == []
    assert found(stage, other) == [], "defaults are nobody's wish"


@pytest.mark.parametrize("given", ["data.train_on=all", "data.pack_rows=false"])
def test_prompts_are_neither_packed_nor_trained_on(given: str) -> None:
    (said,) = found("grpo", given)
    assert given.split("=")[0] in said and "stage = grpo" in said
    assert found("sft", given) == []


def test_margins_are_asked_of_data_that_has_some() -> None:
    require_margins({"a": np.zeros(3, np.float32), "b": np.array([0, 1.5], np.float32)})
    with pytest.raises(DataError, match="reward.reward_margin = true, but no pair of a, b has"):
        require_margins({"a": np.zeros(3, np.float32), "b": np.zeros(2, np.float32)})
