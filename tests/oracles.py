"""The golden fixtures of tests/fixtures/oracles: our losses on the same inputs, and how far they are from the oracles'.

``tools/make_oracle_fixtures.py`` made them. Sequences lie one a row, or all in one row with padding between: the same
numbers must come out. Shapes: n sequences of W tokens, S slots of a row, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_slm.parallel.pipeline import Batch
from megatron_slm.parallel.vocab_divergence import Teacher, vocab_parallel_divergence
from megatron_slm.parallel.vocab_scores import LOGPROB, Vocabulary, vocab_parallel_scores
from megatron_slm.stages import advantages, distill, dpo, grpo, ppo, reward, sft
from megatron_slm.stages.config import DistillConfig, DpoConfig, GrpoConfig, PpoConfig, RewardConfig, SftConfig
from megatron_slm.stages.segments import Loss
from megatron_slm.stages.surrogate import kl_estimate

FIXTURES = Path(__file__).parent / "fixtures" / "oracles"
STAGES = ("sft", "reward", "dpo", "grpo", "distill", "ppo", "advantages")

Case = dict[str, Any]
Layout = Callable[[Tensor], Tensor]
"""[n, S', ...] of sequences -> [B, S, ...] of rows."""


class OneRank:
    """A tp group of one."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


class Answer(NamedTuple):
    """What there is of a case, ours or the oracle's, by name (loss, gradient, advantages ...)."""

    ours: dict[str, Tensor]
    theirs: dict[str, Tensor]

    @property
    def error(self) -> float:
        """The largest difference of a tensor over its largest number; of a loss below 1 the difference itself."""
        return max(self._errors())

    def _errors(self) -> Iterator[float]:
        for name, their in self.theirs.items():
            assert self.ours[name].shape == their.shape, f"{name}: {self.ours[name].shape} is not {their.shape}"
            largest = their.abs().max().clamp(min=1.0 if name == "loss" else 0.0)
            yield float((self.ours[name] - their).abs().max() / largest)


def fixture(stage: str) -> Case:
    """One stage's file."""
    loaded: Case = json.loads((FIXTURES / f"{stage}.json").read_text(encoding="utf-8"))
    return loaded


def cases() -> list[tuple[str, str]]:
    """(stage, name) of every case there is."""
    return [(stage, case["name"]) for stage in STAGES for case in fixture(stage)["cases"]]


def answer(stage: str, name: str, layout: Layout | None = None) -> Answer:
    """Ours and the oracle's answer to one case."""
    found = fixture(stage)
    (case,) = [case for case in found["cases"] if case["name"] == name]
    inputs = {key: torch.tensor(value) for key, value in found["inputs"].items()}
    if stage == "advantages":
        return Answer(_advantages(case, inputs), {key: torch.tensor(case[key]) for key in RESULTS if key in case})
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    arrange = layout or (lambda values: values)
    if stage == "ppo":
        leaf, loss, mean = _of_actions(case, inputs)
    else:
        leaf = inputs["values" if stage == "reward" else "logits"].requires_grad_()
        loss = OURS[stage](case, inputs, arrange)
        mean = loss[0] / loss[1]
    mean.backward()
    assert leaf.grad is not None, "the loss does not depend on its input"
    theirs = {key: torch.tensor(case[key]) for key in ("loss", "gradient")}
    ours = {"loss": mean.detach(), "gradient": leaf.grad}
    logged = loss[2]["loss"]
    assert torch.allclose(logged[0] / logged[1], mean.detach()), "the logged loss is not the one that is minimised"
    if "advantages" in case and stage == "grpo":
        theirs["advantages"] = torch.tensor(case["advantages"]).flatten()
        ours["advantages"] = advantages.group_advantages(
            inputs["rewards"], GrpoConfig(**case["config"])
        ).advantages.flatten()
    return Answer(ours, theirs)


RESULTS = ("advantages", "returns")


def labels_of(inputs: Case, *, pooled: bool = False) -> Batch:
    """The fields of the sequences, one a row: [n, W - 1], or [n, W] where a scalar is read at the last token."""
    tokens, lengths, prompts = inputs["tokens"], inputs["lengths"][:, None], inputs["prompts"][:, None]
    rows, width = tokens.shape
    places = torch.arange(width if pooled else width - 1).expand(rows, -1)
    labels = torch.cat([tokens[:, 1:], tokens[:, -1:]], 1)[:, : places.shape[1]]
    trained = (places >= prompts - 1) & (places < (lengths if pooled else lengths - 1))
    numbers = torch.arange(rows)[:, None].expand_as(places)
    return {
        "labels": labels,
        "loss_mask": trained.float(),
        "segments": torch.where(trained, numbers, -1),
        "position_ids": places,
    }


def in_one_row(values: Tensor) -> Tensor:
    """[n, S, ...] -> [1, n x S, ...]: the sequences and their padding behind each other."""
    return values.reshape(1, -1, *values.shape[2:])


def scores(logits: Tensor, batch: Batch, temperature: float = 1.0) -> Tensor:
    """[B, S, V] -> [3, B, S]: what ``TokenScores`` makes of hidden states that are the logits."""
    vocabulary = Vocabulary(logits.shape[-1], temperature)
    eye = torch.eye(logits.shape[-1], dtype=logits.dtype)
    found = vocab_parallel_scores(
        logits.flatten(0, 1),
        eye,
        batch["labels"].flatten(),
        batch["loss_mask"].flatten(),
        group=OneRank(),
        vocabulary=vocabulary,
    )
    return found.view(3, *logits.shape[:2])


def arranged(batch: Batch, arrange: Layout) -> Batch:
    """A batch of sequences as one of rows."""
    return {name: arrange(values) for name, values in batch.items()}


def _sft(case: Case, inputs: Case, arrange: Layout) -> Loss:
    batch = arranged(labels_of(inputs), arrange)
    return sft.loss(scores(arrange(inputs["logits"][:, :-1]), batch), batch, config=SftConfig(**case["config"]))


def _reward(case: Case, inputs: Case, arrange: Layout) -> Loss:
    batch = labels_of(inputs, pooled=True)
    batch["margins"] = inputs["margins"].repeat_interleave(2)[:, None].expand_as(batch["loss_mask"]).float()
    batch = arranged(batch, arrange)
    return reward.loss(arrange(inputs["values"]), batch, config=RewardConfig(**case["config"]))


def _dpo(case: Case, inputs: Case, arrange: Layout) -> Loss:
    config = DpoConfig(**case["config"])
    batch = labels_of(inputs)
    batch["ref_logprobs"] = scores(inputs["ref_logits"][:, :-1], batch)[LOGPROB]
    chosen = batch["loss_mask"] * (1.0 - batch["segments"] % 2)
    batch["sft_weights"] = chosen.double() * dpo.sft_token_weight(config.dpo_sft_weight, 2, int(chosen.sum()))
    batch = arranged(batch, arrange)
    return dpo.loss(scores(arrange(inputs["logits"][:, :-1]), batch), batch, config=config)


def _grpo(case: Case, inputs: Case, arrange: Layout) -> Loss:
    config = GrpoConfig(**case["config"])
    batch = labels_of(inputs)
    for name in ("old", "ref", "generation"):
        # Generation names the probabilities it drew with, before the temperature of training.
        temperature = 1.0 if name == "generation" else case["temperature"]
        found = scores(inputs[f"{name}_logits"][:, :-1], batch, temperature)
        batch[f"{name}_logprobs"] = found[LOGPROB]
    of_samples = advantages.group_advantages(inputs["rewards"], config).advantages.flatten()
    batch["advantages"] = of_samples[:, None].expand_as(batch["loss_mask"])
    batch = arranged(batch, arrange)
    logits = arrange(inputs["logits"][:, :-1])
    return grpo.loss(scores(logits, batch, case["temperature"]), batch, config=config)


def _distill(case: Case, inputs: Case, arrange: Layout) -> Loss:
    config = DistillConfig(**case["config"])
    batch = arranged(labels_of(inputs), arrange)
    logits, teacher = arrange(inputs["logits"][:, :-1]), arrange(inputs["teacher_logits"][:, :-1])
    eye = torch.eye(logits.shape[-1], dtype=logits.dtype)
    found = vocab_parallel_divergence(
        logits.flatten(0, 1),
        eye,
        batch["labels"].flatten(),
        batch["loss_mask"].flatten(),
        teacher=Teacher(teacher.flatten(0, 1), eye),
        beta=config.distill_beta,
        group=OneRank(),
        vocabulary=Vocabulary(logits.shape[-1], config.distill_temperature),
    )
    return distill.loss(found.view(6, *logits.shape[:2]), batch, config=config)


OURS: dict[str, Callable[[Case, Case, Layout], Loss]] = {
    "sft": _sft,
    "reward": _reward,
    "dpo": _dpo,
    "grpo": _grpo,
    "distill": _distill,
}
"""Our loss of a case."""


def _of_actions(case: Case, inputs: Case) -> tuple[Tensor, Loss, Tensor]:
    """Of PPO and of verl's GRPO, whose inputs are log-probabilities and values [4, 5]: leaf, loss, mean."""
    batch: Batch = {"loss_mask": inputs["mask"].float(), "segments": torch.arange(4)[:, None].expand(4, 5)}
    batch["segments"] = torch.where(inputs["mask"], batch["segments"], -1)
    batch |= {name: inputs[name] for name in ("old_logprobs", "old_values", "returns")}
    batch["advantages"] = inputs[case["advantages"]]
    leaf = inputs["values" if case["stage"] == "value" else "logprobs"].requires_grad_()
    output = torch.stack([leaf, torch.zeros_like(leaf), torch.zeros_like(leaf)])
    if case["stage"] == "grpo":
        loss = grpo.loss(output, batch, config=GrpoConfig(**case["config"]))
    elif case["stage"] == "value":
        loss = ppo.value_loss(leaf, batch, config=PpoConfig(**case["config"]))
    else:
        loss = ppo.loss(output, batch, config=PpoConfig(**case["config"]))
    return leaf, loss, loss[0] / loss[1]


def _advantages(case: Case, inputs: Case) -> dict[str, Tensor]:
    whitened = case["name"].endswith("whitened rewards")
    mask = torch.ones_like(inputs["mask"]) if whitened else inputs["mask"]
    if case["kind"] == "group":
        return {"advantages": advantages.group_advantages(inputs["rewards"], GrpoConfig(**case["config"])).advantages}
    if case["kind"] == "kl":
        return {"advantages": kl_estimate(inputs["logprobs"], inputs["ref_logprobs"], case["name"])}
    rewards, _ = advantages.token_rewards(
        inputs["scores"], inputs["logprobs"], inputs["ref_logprobs"], mask, coefficient=0.1, estimator="k1"
    )
    if whitened:
        rewards = advantages.whiten(rewards, mask, advantages.moments(rewards, mask), centred=False)
    found, returns = advantages.generalised_advantages(rewards, inputs["values"], mask, gamma=0.97, lambda_=0.9)
    config = PpoConfig(ppo_convention=case["oracle"])
    total = advantages.moments(found, mask)
    return {"advantages": advantages.whiten_advantages(found, mask, total, config), "returns": returns}
