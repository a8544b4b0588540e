"""Who judges the answers of a run: verifiers by name, and a reward model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.config.load import load
from megatron_slm.config.rules import violations
from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.examples.prompts import Prompt, Prompts
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import ConfigError
from megatron_slm.evaluate.registry import REWARD_MODEL
from megatron_slm.evaluate.rewards import Part, parts_of, total
from megatron_slm.evaluate.verifier_pool import VerifierPool
from megatron_slm.evaluate.verifier_process import Asked
from megatron_slm.model.ending import Scalar
from megatron_slm.rollout.score import scores
from megatron_slm.run_parts import Run
from megatron_slm.run_policy import frozen
from megatron_slm.stages.experience import Judge, Judged, ends_model, micro_batches_of_all
from megatron_slm.stages.pretrain import local_batch
from megatron_slm.stages.reference import Frozen
from megatron_slm.stages.segments import last_labels, segments_of
from megatron_slm.stages.sequences import Drawn, Shape, filled_up, lay_out
from megatron_slm.train import parents
from megatron_slm.train.saved_state import read_state
from megatron_slm.train.step import StepPlan


def judge_of(run: Run) -> tuple[Judge, tuple[str, ...]]:
    """Scores answers as ``rollout.rewards`` says, and the names of a score's parts. Collective.

    Raises:
        ConfigError: a verifier is not known or cannot be loaded, or the reward model is not one of these answers.
    """
    config = run.resolved.config
    parts = parts_of(config.rollout)
    names = tuple(part.name for part in parts)
    model: RewardModel | None = None
    if config.rollout.reward_model is not None:
        source, own = reward_model_config(run)
        shape = Shape(config.model.seq_length, config.train.micro_batch_size, run.data.tokenizer.eod_id)
        model = RewardModel(frozen(run, own, source, Scalar()), shape, run.plan)
    functions = [part.verifier for part in parts if part.verifier != REWARD_MODEL]
    pool: VerifierPool | None = None
    if functions and speaks(run.plan):
        pool = VerifierPool(functions, workers=config.rollout.reward_workers, timeout_s=config.rollout.reward_timeout_s)
    warn = run.log.warn if run.log is not None else None
    return Court(parts, run.data.tokenizer, run.plan, pool=pool, model=model, warn=warn), names


class Court:
    """A :data:`megatron_slm.stages.experience.Judge`. Collective over all ranks: copies may have uneven numbers.

    Args:
        parts: of a score.
        pool: runs the verifiers, on the rank of each copy that :func:`speaks`.
        model: gives the part named "model".
        warn: writes a line into the log, on the rank that has one.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        tokenizer: Tokenizer,
        plan: StepPlan,
        *,
        pool: VerifierPool | None,
        model: RewardModel | None,
        warn: Callable[[str], None] | None,
    ) -> None:
        self._parts, self._tokenizer, self._plan = parts, tokenizer, plan
        self._pool, self._model, self._warn = pool, model, warn
        self._said = False

    def __call__(self, drawn: Sequence[Drawn], prompts: Sequence[Prompt]) -> list[Judged]:
        """The worth of each answer, the same on all ranks of a copy."""
        values = torch.full((len(self._parts), len(drawn)), math.nan, dtype=torch.float64, device=self._plan.device)
        causes: list[str] = []
        if self._pool is not None:
            causes = self._verified(values, drawn, prompts)
        if self._model is not None:
            found = self._model(drawn)
            if speaks(self._plan):
                values[[part.verifier for part in self._parts].index(REWARD_MODEL)] = found
        copy = self._plan.groups.mp
        if copy.size() > 1:
            dist.broadcast(values, group=copy, group_src=speaker(self._plan))
        self._say(causes)
        names = [part.name for part in self._parts]
        rows = [dict(zip(names, row, strict=True)) for row in values.T.tolist()]
        return [
            Judged(total(row, self._parts), {name: value for name, value in row.items() if not math.isnan(value)})
            for row in rows
        ]

    def _verified(self, values: Tensor, drawn: Sequence[Drawn], prompts: Sequence[Prompt]) -> list[str]:
        """Fill in what the verifiers say; returns why they could not, the first cause first."""
        assert self._pool is not None, "on the rank that speaks"
        asked, places = [], []
        for number, (each, prompt) in enumerate(zip(drawn, prompts, strict=True)):
            before, answer = texts(each, self._tokenizer)
            fields = {"prompt": before, **prompt.fields}
            for row, part in enumerate(self._parts):
                if part.verifier != REWARD_MODEL:
                    asked.append(Asked(part.verifier, answer, fields))
                    places.append((row, number))
        causes = []
        for (row, number), score in zip(places, self._pool.scores(asked), strict=True):
            values[row, number] = score.value
            if score.cause:
                where = f"sample {drawn[number].sample} (row {prompts[number].number + 1} of the prompts)"
                causes.append(f"{self._parts[row].name} could not judge {where}: {score.cause}")
        return causes

    def _say(self, causes: list[str]) -> None:
        """Write the first cause of the run into the log. Collective until it is written."""
        if self._said:
            return
        told: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(told, causes[:1])
        everyone = [cause for part in told for cause in part]
        self._said = bool(everyone)
        if everyone and self._warn is not None:
            self._warn(
                f"the verifier {everyone[0]}. Such answers are left out and counted (completions/unscored_ratio); this "
                "is said once."
            )


def texts(drawn: Drawn, tokenizer: Tokenizer) -> tuple[str, str]:
    """The prompt and the answer as text, without the token that ends the answer.

    They are decoded together, because a tokenizer with a dummy prefix drops the first space of what it decodes.
    """
    tokens = drawn.completion.tokens
    before = tokenizer.decode(drawn.prompt)
    whole = tokenizer.decode([*drawn.prompt, *(tokens[:-1] if drawn.completion.finished else tokens)])
    return before, whole[len(before) :]


def speaker(plan: StepPlan) -> int:
    """The rank in the group of a model copy that judges: the first tp rank of the last pipeline stage."""
    return int((plan.groups.pp.size() - 1) * plan.groups.tp.size())


def speaks(plan: StepPlan) -> bool:
    """Whether this rank judges for its copy."""
    return ends_model(plan) and bool(plan.groups.tp.rank() == 0)


class RewardModel:
    """A frozen model with a number at its end, read at the last token of an answer."""

    def __init__(self, model: Frozen, shape: Shape, plan: StepPlan) -> None:
        self._model, self._shape, self._plan = model, shape, plan

    def __call__(self, drawn: Sequence[Drawn]) -> Tensor:
        """The number of each sequence, float64 [N]; NaN on the ranks that do not end the model. Collective."""
        plan = self._plan
        laid = lay_out(drawn, self._shape, counts=[True] * len(drawn), pooled=True)
        laid = filled_up(laid, micro_batches_of_all(len(laid.batches), self._model.chunks, plan), self._shape)
        batches = [local_batch(batch, plan) for batch in laid.batches]
        outputs = scores(self._model.chunks, batches, seq_length=plan.seq_length, groups=plan.groups)
        found = torch.full((len(drawn),), math.nan, dtype=torch.float64, device=plan.device)
        for batch, output, own in zip(batches, outputs, laid.owners, strict=False):
            last = last_labels(segments_of(batch), batch["position_ids"])
            owners = torch.tensor([*own, 0], device=plan.device)
            found[owners[batch["segments"][last]]] = output[last].double()
        return found


def reward_model_config(run: Run) -> tuple[Path, RunConfig]:
    """The checkpoint of the reward model, and this run's configuration with its model.

    Raises:
        ConfigError: it gives no number, reads other tokens, or does not fit the layout or the length of this run.
    """
    config = run.resolved.config
    name = f"rollout.reward_model = {config.rollout.reward_model}"
    source = parents.checkpoint_of(run.state.records, "rollout.reward_model", str(config.rollout.reward_model))
    theirs, tokenizer_hash = load(source / "config.yaml").config, read_state(source).tokenizer_hash
    if theirs.stage != "reward":
        raise ConfigError(
            f"{name} was trained with stage {theirs.stage}, which ends with words. Give one of stage reward."
        )
    tokenizer = run.data.tokenizer
    if tokenizer_hash != tokenizer.hash:
        raise ConfigError(
            f"{name} has another tokenizer ({tokenizer_hash}) than the prompts ({tokenizer.hash}): the "
            "same ids mean other text. Compile the prompts with the reward model's tokenizer."
        )
    width = theirs.model.vocab_size or tokenizer.vocab_size
    if width != run.vocab_size:
        raise ConfigError(f"{name} knows {width} tokens, this run {run.vocab_size}; set model.vocab_size={width}.")
    own = replace(config, model=replace(theirs.model, seq_length=config.model.seq_length), lora=theirs.lora)
    if problems := violations(own, dist.get_world_size()):
        raise ConfigError(f"{name} does not fit the layout of this run: {problems[0]}")
    prompts = [one for one in (*run.data.train.values(), *run.data.valid.values()) if isinstance(one, Prompts)]
    longest = max(one.store.longest for one in prompts) + config.rollout.max_new_tokens
    if longest > config.model.seq_length:
        raise ConfigError(
            f"{name} reads answers to their last token, with the longest prompt {longest} tokens, but model.seq_length "
            f"is {config.model.seq_length}. Set rollout.max_new_tokens={config.rollout.max_new_tokens - 1}."
        )
    return source, own
