"""The rollout in hand: what is taken up again, and what was made for other steps."""

from __future__ import annotations

import pytest
import torch

from megatron_slm.run_rollouts import means_of
from megatron_slm.stages.rollouts import RolloutPlan, Rollouts

PLAN = RolloutPlan(mini_batches=1, prompts=8, epochs=2)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        # As many steps, of as many prompts each: the micro-batches are still others.
        (RolloutPlan(2, 4, 1), "2 mini-batches of 4 prompts, 1 times"),
        (RolloutPlan(1, 8, 1), "1 mini-batches of 8 prompts, 1 times"),
        (RolloutPlan(2, 8, 2), "2 mini-batches of 8 prompts, 2 times"),
    ],
)
def test_a_rollout_made_for_other_steps_is_dropped(plan: RolloutPlan, words: str) -> None:
    rollouts = Rollouts(PLAN, torch.device("cpu"))
    rollouts.load({"held": [16, [[]], *PLAN]})
    assert rollouts._held is not None and rollouts._held.start == 16 and not rollouts.dropped
    rollouts.load({"held": [16, [[]], *plan]})
    assert rollouts._held is None and words in rollouts.dropped and "this run takes 1 of 8" in rollouts.dropped


def test_a_mean_is_over_the_mini_batches_that_have_the_number() -> None:
    assert means_of([{"a": 1.0, "b": 4.0}, {"a": 2.0}]) == {"a": 1.5, "b": 4.0}
