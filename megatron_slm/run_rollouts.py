"""A run that learns from what its own model says: who answers, who judges, and what the answers become."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.examples.loader import PromptLoader
from megatron_slm.data.examples.prompts import Prompt
from megatron_slm.data.examples.special_tokens import TemplateTokenizer
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import ConfigError
from megatron_slm.parallel.pipeline import Batch
from megatron_slm.rollout.sampling import Sampling
from megatron_slm.run_data import Data
from megatron_slm.stages.advantages import steered_coefficient
from megatron_slm.stages.critic import Critic
from megatron_slm.stages.experience import (
    Experience,
    Judge,
    Sampler,
    ends_model,
    experience,
    of_rewards,
    sums_over_copies,
)
from megatron_slm.stages.policy_fields import critic_fields, group_fields
from megatron_slm.stages.reference import Frozen, add_live
from megatron_slm.stages.rollouts import RolloutPlan, Rollouts
from megatron_slm.train.step import StepPlan, TrainState

COEFFICIENT = "ppo_kl_coef"


@dataclass
class Maker:
    """Makes the rollouts of PPO and GRPO.

    Attributes:
        sampler: answers prompts with the policy.
        judge, reward_names: scores answers, and the names of a score's parts.
        reference: what the policy is kept near to, None without a price on the distance.
        critic: of PPO.
        write: puts numbers beside the next step's record, on the rank that logs.
    """

    config: RunConfig
    data: Data
    plan: StepPlan
    state: TrainState
    loader: PromptLoader
    sampler: Sampler
    judge: Judge
    reward_names: tuple[str, ...]
    reference: Frozen | None
    critic: Critic | None
    write: Callable[[dict[str, Any]], None] | None

    def __call__(self, cursor: Cursor) -> list[list[Batch]]:
        """Answer the prompts from ``cursor`` on; see ``stages.rollouts.Make``. Collective."""
        config, size = self.config, self.config.train.global_batch_size
        made, metrics = [], []
        for _ in range(prompts_of_rollout(config) // size):
            prompts = [each for part in self.loader.micro_batches(cursor, size) for each in part]
            found, logged = self._experience(prompts)
            made.append(found.batches)
            metrics.append(logged)
            cursor = cursor.advance(size)
        if self.write is not None:
            self.write(means_of(metrics))
        return made

    def _experience(self, prompts: list[tuple[int, Prompt]]) -> tuple[Experience, dict[str, float]]:
        config, group = self.config, self.sampler.group_size
        drawn = self.sampler.answer(prompts, self.state.step, self.plan)
        judged = self.judge(drawn, [prompt for _, prompt in prompts for _ in range(group)])
        found, logged = experience(
            drawn,
            judged,
            chunks=self.state.chunks,
            group_size=group,
            mask_truncated=config.stage == "grpo" and config.grpo.grpo_mask_truncated,
            plan=self.plan,
            micro_batch_size=config.train.micro_batch_size,
            eod_id=self.loader_eod,
            gap_limits=config.rollout.gap_limits(bf16=config.precision.bf16),
        )
        if self.reference is not None:
            add_live(self.reference, found.batches, self.plan)
        if self.critic is not None:
            for batch, values in zip(found.batches, self.critic.values(found.batches), strict=False):
                batch["old_values"] = values
        if ends_model(self.plan):
            logged |= of_rewards(found, self.reward_names, self.plan)
            logged |= self._fields(found)
        if self.config.stage == "ppo" and self.config.ppo.ppo_kl_target is not None:
            self._steer(logged, len(drawn))
        return found, logged

    @property
    def loader_eod(self) -> int:
        """The end-of-document token, which pads."""
        return next(iter(self.loader.sources.values())).eod_id

    def _fields(self, found: Experience) -> dict[str, float]:
        if self.config.stage == "grpo":
            return group_fields(found, self.config.grpo, self.plan)
        return critic_fields(found, self.config.ppo, self._coefficient, self.plan) | {
            "objective/kl_coef": self._coefficient
        }

    @property
    def _coefficient(self) -> float:
        """What a nat of distance costs now."""
        return float(self.state.records.get("ppo", {}).get(COEFFICIENT, self.config.ppo.ppo_kl_coef))

    def _steer(self, logged: dict[str, float], samples: int) -> None:
        """Move that price towards the target, on every rank: any of them may write the checkpoint. Collective."""
        distance = torch.tensor([logged.get("objective/kl", math.nan)], dtype=torch.float64, device=self.plan.device)
        dist.broadcast(distance, group=self.plan.groups.pp, group_src=self.plan.groups.pp.size() - 1)
        everyone = round(sums_over_copies([float(samples)], self.plan)[0])
        if not distance.isnan():  # no answer was scored
            price = steered_coefficient(self._coefficient, float(distance), everyone, self.config.ppo)
            self.state.records["ppo"] = {COEFFICIENT: price}
        if "objective/kl_coef" in logged:
            logged["objective/kl_coef"] = self._coefficient


def means_of(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each number over the mini-batches that have it."""
    columns = {name: [each[name] for each in metrics if name in each] for one in metrics for name in one}
    return {name: sum(column) / len(column) for name, column in columns.items()}


def prompts_of_rollout(config: RunConfig) -> int:
    """Prompts that are answered before the policy learns from any of them."""
    return config.rollout.prompts or config.train.global_batch_size


def epochs_of(config: RunConfig) -> int:
    """Times that a rollout is trained on."""
    return config.ppo.ppo_epochs if config.stage == "ppo" else config.grpo.grpo_iterations


def group_size_of(config: RunConfig) -> int:
    """Samples of each prompt."""
    return config.grpo.grpo_group_size if config.stage == "grpo" else 1


def rollouts_of(config: RunConfig, device: torch.device) -> Rollouts:
    """The part of the state that holds the rollout in hand."""
    size = config.train.global_batch_size
    plan = RolloutPlan(prompts_of_rollout(config) // size, size, epochs_of(config))
    return Rollouts(plan, device)


def sampling_of(config: RunConfig, tokenizer: Tokenizer) -> Sampling:
    """How the policy's completions are drawn: with the end-of-document token and those that are named they end.

    Raises:
        ConfigError: the tokenizer does not know a named token.
    """
    own = config.rollout
    special = TemplateTokenizer(tokenizer).special
    unknown = [name for name in own.stop_tokens if name not in special]
    if unknown:
        raise ConfigError(
            f"rollout.stop_tokens: the tokenizer has no special token {unknown[0]!r}. It has "
            f"{', '.join(sorted(special)) or 'none'}."
        )
    stops = (tokenizer.eod_id, *(special[name] for name in own.stop_tokens))
    return Sampling(own.max_new_tokens, own.sampling_temperature, own.top_k, own.top_p, own.sampling_seed, stops)


def greedy(sampling: Sampling) -> Sampling:
    """The likeliest token each time."""
    return replace(sampling, temperature=0.0, top_k=0, top_p=1.0)


def evaluation_of_answers(
    config: RunConfig, data: Data, plan: StepPlan, sampler: Sampler, judge: Judge, names: tuple[str, ...]
) -> Callable[[TrainState], dict[str, float]]:
    """A function that answers the first held-out prompts greedily and says how good the answers are. Collective."""
    limit = config.train.eval_iters * config.train.global_batch_size
    alone = sampler._replace(sampling=greedy(sampler.sampling), group_size=1)

    def evaluate(state: TrainState) -> dict[str, float]:
        columns: dict[str, list[float]] = {
            name: [] for name in ("reward", *(f"rewards/{name}" for name in names), "finished", "length")
        }
        for source in data.valid.values():
            numbers = range(min(limit, source.num_samples))
            prompts = [
                (number, source.prompt(number)) for number in numbers[plan.groups.dp.rank() :: plan.groups.dp.size()]
            ]
            drawn = alone.answer(prompts, state.step, plan)
            for each, one in zip(drawn, judge(drawn, [prompt for _, prompt in prompts]), strict=True):
                columns["finished"].append(each.completion.finished)
                columns["length"].append(len(each.completion.tokens))
                if not math.isnan(one.total):
                    columns["reward"].append(one.total)
                for name, value in one.parts.items():  # those that could be scored
                    columns[f"rewards/{name}"].append(value)
        sums = [math.fsum(column) for column in columns.values()]
        found = sums_over_copies([*sums, *(float(len(column)) for column in columns.values())], plan)
        totals, counts = (dict(zip(columns, half, strict=True)) for half in (found[: len(sums)], found[len(sums) :]))
        means = {name: total / counts[name] if counts[name] else math.nan for name, total in totals.items()}
        return means | {"answers": counts["length"], "unscored": counts["length"] - counts["reward"]}

    return evaluate
