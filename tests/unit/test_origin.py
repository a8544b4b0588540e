"""Which checkpoints a new run may start from: those whose weights mean the same in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatron_slm.config.load import load
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.mixture import MixtureOrder
from megatron_slm.data.order import SampleOrder
from megatron_slm.errors import CheckpointError
from megatron_slm.model.config import ModelConfig
from megatron_slm.train.origin import MAY_DIFFER, STRETCHING, Origin, verify_origin, without
from tests.checkpoints import whole, write_run


def source(tmp_path: Path, *overrides: str) -> Path:
    """A run with one checkpoint, whose tokenizer has the hash "0"."""
    tensor = torch.zeros(2)
    write_run(tmp_path / "source", [("w", tensor, whole(tensor))], *overrides)
    return tmp_path / "source"


def started(tmp_path: Path, *overrides: str, tokenizer: str = "0") -> Origin:
    config = load(None, ["--preset", "tiny", "name=new", *overrides]).config
    cursor = Cursor.start(MixtureOrder.of_one("text", SampleOrder(8, 0, "0", 16)), tokenizer)
    return verify_origin(config, tmp_path / "new" / "checkpoints", cursor, "", fresh=False)


@pytest.mark.parametrize("key", ["checkpoint.pretrained_checkpoint", "ppo.ppo_critic_checkpoint"])
def test_another_tokenizer_is_refused(tmp_path: Path, key: str) -> None:
    option = f"{key}={source(tmp_path)}"
    started(tmp_path, "stage=ppo", option)
    with pytest.raises(CheckpointError, match=rf"{key} = .* has another tokenizer \(0\) than the data \(1\)"):
        started(tmp_path, "stage=ppo", option, tokenizer="1")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rotary_base", "500000"),
        ("rotary_percent", "0.5"),
        ("use_rope_scaling", "true"),
        ("layernorm_epsilon", "1e-6"),
        ("qk_layernorm", "true"),
        ("moe_router_topk", "1"),
        ("moe_router_score_function", "sigmoid"),
        ("kv_lora_rank", "256"),
        ("mup_base_hidden_size", "64"),
    ],
)
def test_a_field_that_changes_what_weights_compute_is_refused(tmp_path: Path, field: str, value: str) -> None:
    start = ("stage=sft", f"checkpoint.pretrained_checkpoint={source(tmp_path)}", f"model.{field}={value}")
    with pytest.raises(CheckpointError, match=rf"\(model.{field}: .* there, .* here\)"):
        started(tmp_path, *start)


def test_a_field_of_training_may_differ(tmp_path: Path) -> None:
    start = f"checkpoint.pretrained_checkpoint={source(tmp_path)}"
    options = ("model.seq_length=32", "model.hidden_dropout=0.1", "model.init_method_std=0.1")
    assert started(tmp_path, "stage=sft", start, *options).weights_only
    assert started(tmp_path, start, "model.rotary_base=500000", "model.use_rope_scaling=true").weights_only
    as_in_a_file_of_fp32 = "model.layernorm_epsilon=9.999999747378752e-06"
    assert started(tmp_path, "stage=sft", start, as_in_a_file_of_fp32).weights_only
    assert {*MAY_DIFFER, *STRETCHING} <= {*ModelConfig.__dataclass_fields__}


def test_a_policy_does_not_start_from_a_reward_model(tmp_path: Path) -> None:
    start = f"checkpoint.pretrained_checkpoint={source(tmp_path, 'stage=reward')}"
    with pytest.raises(CheckpointError, match="is a reward model: it ends with a number"):
        started(tmp_path, "stage=grpo", start)
    assert started(tmp_path, "stage=reward", start).weights_only
    shutil.rmtree(tmp_path / "source")
    source(tmp_path)
    assert started(tmp_path, "stage=grpo", start).weights_only


def test_a_rollout_of_another_layout_is_not_said_to_be_missing() -> None:
    assert without("rollout", ["rollout", "critic"]).endswith("it is drawn anew, because the layout changed")
    assert without("critic", ["rollout"]) == "holds no critic: it starts from the loaded weights"
