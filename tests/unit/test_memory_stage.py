"""``mslm memory`` after pretraining: the models beside the trained one, and what a rollout holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_slm.config.load import load
from megatron_slm.config.run_config import RunConfig
from megatron_slm.parallel import device

device.preload("cpu")

from megatron_slm import run_dry_stage  # noqa: E402
from megatron_slm.memory import report  # noqa: E402
from megatron_slm.memory.ledger import Ledger  # noqa: E402
from megatron_slm.run_dry import job_ledgers  # noqa: E402

SMALL = (
    "model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4", "model.seq_length=32",
    "model.vocab_size=500", "train.global_batch_size=2", "rollout.max_new_tokens=8",
)  # fmt: skip


def config(stage: str, *overrides: str) -> RunConfig:
    own = [item for item in SMALL if not item.startswith("rollout.") or stage in ("ppo", "grpo")]
    return load(None, [f"stage={stage}", *own, *overrides]).config


def ledger(stage: str, *overrides: str) -> Ledger:
    (found,) = job_ledgers(config(stage, *overrides), for_gpu=False)
    return found


def others(found: Ledger) -> dict[str, int]:
    return {row.module: row.size for row in found.rows if row.kind == "other models"}


def weights(found: Ledger) -> int:
    return found.by_kind()["parameters"]


def test_ppo_holds_a_critic_with_its_optimizer_and_a_reference() -> None:
    alone = ledger("ppo", "ppo.ppo_kl_coef=0")
    found = ledger("ppo")
    assert set(others(alone)) == {"critic"} and set(others(found)) == {"critic", "reference"}
    assert others(found)["reference"] == pytest.approx(weights(found), rel=0.02)
    # Weights, gradients and two moments in fp32, of a model with a head of one row in the place of the vocabulary.
    vocabulary = 512 * 64 * 4
    assert others(found)["critic"] == pytest.approx(4 * (weights(found) - vocabulary), rel=0.05)
    more = found.timeline.peak_bytes - alone.timeline.peak_bytes
    assert more == pytest.approx(others(found)["reference"], abs=4096), "and what it says of each label"


def test_models_beside_are_those_that_the_options_ask_for(tmp_path: Path) -> None:
    def names(stage: str, *overrides: str) -> set[str]:
        return set(run_dry_stage.beside(config(stage, *overrides), lambda *_: None))  # type: ignore[arg-type]

    assert names("grpo") == set() == names("sft") == names("reward") == names("dpo")
    assert names("grpo", "grpo.grpo_kl_beta=0.1") == {"reference"} == names("dpo", "dpo.dpo_reference=live")
    assert names("dpo", "dpo.dpo_reference=live", "lora.lora_rank=4") == set(), "the model itself, its adapters off"
    assert names("grpo", f"rollout.reward_model={tmp_path}") == {"reward model"}
    assert names("distill", f"distill.distill_teacher={tmp_path}") == {"teacher"}
    assert names("distill", f"distill.distill_teacher={tmp_path}", "distill.teacher_topk=4") == set()
    (note, *_) = run_dry_stage.notes(config("distill", f"distill.distill_teacher={tmp_path}"))
    assert f"distill.distill_teacher = {tmp_path} is not here" in note


@pytest.mark.parametrize(
    ("stage", "for_gpu"), [("sft", True), ("reward", True), ("dpo", False), ("grpo", True), ("distill", False)]
)
def test_every_stage_has_a_ledger(stage: str, for_gpu: bool) -> None:
    (found,) = job_ledgers(config(stage), for_gpu=for_gpu)
    assert found.timeline.peak_bytes > found.timeline.static_bytes > 0
    table = report.table([found])
    assert ("other models" in table) == (stage == "distill")
    if stage != "distill":
        assert "other models" not in report.bars([found])


def test_caches_of_a_rollout_count_where_they_are_more_than_a_step() -> None:
    few, many = (ledger("grpo", f"rollout.batch_size={size}") for size in (1, 10_000))
    assert "rollout" not in few.by_kind()
    # Keys and values of 4 heads of 16 channels in 2 layers, 32 positions, fp32.
    held = run_dry_stage.cache_bytes(config("grpo", "rollout.batch_size=10000"), layers=2)
    assert held == 2 * 2 * 10_000 * 32 * 4 * 16 * 4
    assert many.size == many.timeline.static_bytes + held
    assert "keys and values" in run_dry_stage.notes(config("grpo"))[-1]
