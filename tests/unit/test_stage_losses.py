"""What must hold of every stage's loss, whatever it minimises: step 0, masks, cuts."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from megatron_slm.errors import ConfigError
from megatron_slm.parallel.vocab_scores import LOGPROB
from megatron_slm.stages import distill, dpo, grpo, ppo, reward, sft
from megatron_slm.stages.config import DistillConfig, DpoConfig, GrpoConfig, PpoConfig, RewardConfig, SftConfig
from megatron_slm.stages.segments import Logs
from tests.stage_batches import LOSSES, SLOTS, TOPK, made, part_of


def mean(logs: Logs, name: str) -> float:
    total, count = logs[name].tolist()
    return float(total / count)


def gradient(output: Tensor, total: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(total, output)
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_numbers_in_masked_slots_have_no_effect(name: str) -> None:
    clean = made(name)
    output = clean.output.clone().requires_grad_()
    total, count, logs = clean(output)
    masked = clean.batch["loss_mask"] == 0
    spoiled = clean.output.clone()
    spoiled[masked.expand_as(spoiled)] = math.nan
    spoiled.requires_grad_()
    batch = dict(clean.batch)
    for field, values in batch.items():
        if values.is_floating_point() and field != "loss_mask":
            batch[field] = torch.where(masked.view(*masked.shape, *[1] * (values.dim() - 2)), math.nan, values)
    found = clean(spoiled, batch)
    assert torch.equal(found[0], total) and torch.equal(found[1], count)
    assert all(torch.equal(found[2][key], pair) for key, pair in logs.items())
    assert torch.equal(gradient(spoiled, found[0]), gradient(output, total))


@pytest.mark.parametrize("name", LOSSES)
def test_a_micro_batch_without_labels_is_exactly_zero(name: str) -> None:
    empty = made(name)
    empty.batch["loss_mask"].zero_()
    empty.batch["segments"].fill_(-1)
    output = empty.output.clone().requires_grad_()
    total, count, logs = empty(output)
    assert total.item() == 0.0 and count.item() == 0 and count.dtype == torch.int
    assert all(pair.tolist() == [0.0, 0.0] for pair in logs.values())
    assert not gradient(output, total).any()


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_depends_on_the_micro_batches(name: str) -> None:
    whole = made(name, rows=4)
    output = whole.output.clone().requires_grad_()
    total, count, logs = whole(output)
    parts = [part_of(whole, rows) for rows in (slice(0, 1), slice(1, 3), slice(3, 4))]
    leaves = [part.clone().requires_grad_() for part, _ in parts]
    found = [whole(leaf, batch) for leaf, (_, batch) in zip(leaves, parts, strict=True)]
    assert torch.allclose(sum(each[0] for each in found), total, rtol=1e-12)  # type: ignore[arg-type]
    assert sum(int(each[1]) for each in found) == int(count) > 0
    for key, pair in logs.items():
        assert torch.allclose(sum(each[2][key] for each in found), pair, rtol=1e-12)  # type: ignore[arg-type]
    gradients = [gradient(leaf, each[0]) for leaf, each in zip(leaves, found, strict=True)]
    assert torch.allclose(torch.cat(gradients, dim=-2), gradient(output, total), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_comes_first_and_is_the_one_that_is_minimised(name: str) -> None:
    total, count, logs = made(name)()
    assert next(iter(logs)) == "loss"
    assert logs["loss"].tolist() == [pytest.approx(total.item()), count.item()]
    assert all(pair.shape == (2,) and pair.dtype == torch.float64 and not pair.requires_grad for pair in logs.values())
    assert total._base is None, "core frees what it is given, and refuses a view"


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_has_the_precision_of_the_output(name: str) -> None:
    """A field in float64 makes no float64 loss, and the sums of a log lose nothing on the way."""
    exact = made(name)
    total, _, logs = exact(exact.output.float())
    assert total.dtype == torch.float32 and total.item() == pytest.approx(exact()[0].item(), rel=1e-4)
    assert all(pair.dtype == torch.float64 for pair in logs.values())


def test_logged_names_are_known_before_the_first_step() -> None:
    for name, module in (("sft dft", sft), ("dpo sigmoid", dpo), ("grpo gspo", grpo), ("grpo cispo", grpo)):
        assert tuple(made(name)()[2]) == module.logged(LOSSES[name][1])  # type: ignore[attr-defined]
    assert tuple(made("reward")()[2]) == reward.LOGGED
    assert tuple(made("ppo")()[2]) == ppo.LOGGED and tuple(made("value")()[2]) == ppo.VALUE_LOGGED
    assert tuple(made("distill")()[2]) == distill.LOGGED
    assert tuple(made("distill stored")()[2]) == distill.STORED_LOGGED


def test_dpo_starts_at_ln_2_without_margins() -> None:
    for kind in ("sigmoid", "sigmoid_norm", "robust"):
        start = made("dpo sigmoid")
        start.batch["ref_logprobs"] = start.output[LOGPROB]
        _, count, logs = dpo.loss(start.output, start.batch, config=DpoConfig(dpo_loss=kind, dpo_label_smoothing=0.2))
        assert int(count) == 4 and mean(logs, "loss") == pytest.approx(math.log(2), abs=1e-15)
        assert mean(logs, "rewards/margins") == mean(logs, "logps/chosen_delta") == 0.0


def test_a_reward_model_with_a_zero_head_starts_at_ln_2() -> None:
    start = made("reward")
    _, count, logs = reward.loss(torch.zeros_like(start.output), start.batch, config=RewardConfig())
    assert int(count) == 4 and mean(logs, "loss") == pytest.approx(math.log(2), abs=1e-15)
    assert mean(logs, "accuracy") == mean(logs, "margin") == 0.0


def test_the_reward_is_read_at_the_last_label_of_each_side() -> None:
    batch = made("reward", rows=1).batch
    output = torch.zeros(1, SLOTS)
    output[0, [4, 7]] = torch.tensor([3.0, 1.0])  # the last slots of the first two documents
    _, count, logs = reward.loss(output, batch, config=RewardConfig(center_rewards_coefficient=0.0))
    assert logs["margin"].tolist() == [2.0, 2.0] and int(count) == 2


@pytest.mark.parametrize("kind", ["dapo", "grpo", "dr_grpo", "gspo", "cispo"])
def test_grpo_on_policy_has_the_ratio_1_and_no_distance(kind: str) -> None:
    start = made(f"grpo {kind}")
    start.batch["old_logprobs"] = start.batch["ref_logprobs"] = start.output[LOGPROB]
    config = GrpoConfig(grpo_loss=kind, grpo_kl_beta=0.1, grpo_completion_length=7)
    _, _, logs = grpo.loss(start.output, start.batch, config=config)
    assert mean(logs, "policy/ratio") == 1.0 and mean(logs, "kl") == 0.0
    assert all(mean(logs, name) == 0.0 for name in logs if "clip_ratio" in name)
    del start.batch["old_logprobs"]
    _, _, without = grpo.loss(start.output, start.batch, config=config)
    assert all(torch.equal(without[name], pair) for name, pair in logs.items())


def test_ppo_on_policy_has_the_ratio_1() -> None:
    start = made("ppo")
    start.batch["old_logprobs"] = start.output[LOGPROB]
    _, _, logs = ppo.loss(start.output, start.batch, config=PpoConfig())
    assert mean(logs, "val/ratio") == 1.0 and mean(logs, "policy/approxkl") == mean(logs, "policy/clipfrac") == 0.0


def test_weights_scale_the_loss_of_their_labels_alone() -> None:
    whole = made("sft")
    weighted = dict(whole.batch, loss_mask=whole.batch["loss_mask"] * 0.5)
    total, count, _ = whole()
    half, same, _ = whole(batch=weighted)
    assert torch.allclose(half * 2, total) and int(same) == int(count)


def test_dr_grpo_asks_for_its_length() -> None:
    start = made("grpo dapo")
    with pytest.raises(ConfigError, match="grpo_completion_length is not set"):
        grpo.loss(start.output, start.batch, config=GrpoConfig(grpo_loss="dr_grpo"))


def test_conventions_fill_in_what_is_not_given() -> None:
    assert GrpoConfig().kl_bias_correction and not GrpoConfig(grpo_convention="verl").kl_bias_correction
    assert GrpoConfig().dual_clip is None and GrpoConfig(grpo_convention="verl").dual_clip == 3.0
    assert GrpoConfig(grpo_convention="verl", grpo_dual_clip=0.0).dual_clip is None
    assert GrpoConfig(grpo_convention="verl", grpo_loss="gspo").dual_clip is None
    assert GrpoConfig(grpo_convention="nemo_rl").baseline == "leave_one_out" and GrpoConfig().baseline == "mean"
    assert GrpoConfig(grpo_clamp_eps_upper=0.3).ratio_upper == 1.3 and GrpoConfig().ratio_upper == 1.2
    cispo = GrpoConfig(grpo_loss="cispo")
    assert (cispo.ratio_lower, cispo.ratio_upper) == (0.0, 5.0)
    assert dataclasses.replace(cispo, grpo_convention="verl").ratio_upper == 1.2
    assert PpoConfig().dual_clip is None and PpoConfig(ppo_convention="verl").dual_clip == 3.0
    assert SftConfig().sft_loss == "nll"


def test_the_cross_entropy_has_its_share_and_the_divergence_the_rest() -> None:
    start = made("distill")
    of = {
        weight: distill.loss(start.output, start.batch, config=DistillConfig(distill_ce_weight=weight))[2]
        for weight in (0.0, 0.3, 1.0)
    }
    assert mean(of[1.0], "loss") == pytest.approx(mean(of[0.0], "nll"))
    expected = 0.7 * mean(of[0.0], "loss") + 0.3 * mean(of[0.0], "nll")
    assert mean(of[0.3], "loss") == pytest.approx(expected)


def stored(teacher: Tensor, student: Tensor, beta: float, tail: str) -> float:
    """Mean divergence [tokens, K] of a stored teacher."""
    tokens, width = teacher.shape
    output = torch.cat([torch.zeros(1, tokens), student.t(), torch.zeros(2, tokens)])[:, None]
    batch = {"loss_mask": torch.ones(1, tokens), "teacher_logprobs": teacher[None]}
    config = DistillConfig(distill_beta=beta, teacher_topk=width, teacher_tail=tail)
    return mean(distill.stored_loss(output, batch, config=config)[2], "loss")


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_a_stored_teacher_bounds_the_divergence_from_below(beta: float) -> None:
    torch.manual_seed(2)
    teacher, student = torch.randn(2, 50, 8, dtype=torch.float64).log_softmax(-1)
    teacher, order = teacher.sort(-1, descending=True)
    student = student.gather(-1, order)
    whole = distill.divergence(teacher, student, beta).mean().item()
    bounds = [stored(teacher[:, :width], student[:, :width], beta, "bucket") for width in (1, TOPK, 6, 7)]
    assert 0.0 < bounds[0] < bounds[1] < bounds[2] <= bounds[3] == pytest.approx(whole)
    assert stored(teacher, student, beta, "ignore") == pytest.approx(whole)
    assert stored(teacher[:, :TOPK], teacher[:, :TOPK], beta, "bucket") == pytest.approx(0.0, abs=1e-12)
