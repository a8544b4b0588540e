"""Whole runs with adapters: they stop and go on, the weights stay, and what is exported is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slm.parallel.config import ParallelConfig
from tests import alignment, runs
from tests.conversions import mslm
from tests.layouts import logits_under
from tests.ranks import RankFailure, run_ranks

SHAPE = (
    "model.num_layers=2",
    "model.vocab_size=290",
    f"model.seq_length={alignment.SEQ_LENGTH}",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
)
LORA = ("lora.lora_rank=4", "lora.lora_dropout=0.1", "optimizer.lr=1e-2", "train.ema_decay=0.5")
TP2 = "parallel.tensor_model_parallel_size=2"
SP = "parallel.sequence_parallel=true"
PROMPT = torch.arange(4, 24)[None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return alignment.compiled(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Path]) -> Path:
    run = tmp_path_factory.mktemp("base") / "sft"
    more = ("train.train_iters=8", "train.micro_batch_size=8", "optimizer.lr=3e-3")
    assert runs.train(run, data["chat"], 1, *SHAPE, "stage=sft", *more) == 0
    return run


def options(base: Path, *more: str) -> tuple[str, ...]:
    return (*SHAPE, "stage=dpo", f"checkpoint.pretrained_checkpoint={base}", *LORA, "train.train_iters=4", *more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Path], base: Path) -> Path:
    """DPO with adapters on two ranks."""
    run = tmp_path_factory.mktemp("trained") / "dpo"
    assert runs.train(run, data["preference"], 2, *options(base, TP2, SP)) == 0
    return run


def checkpoint(run: Path, step: int) -> Path:
    return Path(runs.checkpoint_path(run, step))


def test_a_run_begins_as_its_base_and_says_what_it_trains(trained: Path) -> None:
    first = runs.records(trained)[0]
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6), "the adapters begin at zero, and off is the reference"
    assert runs.records(trained)[-1]["loss"] < 0.69
    assert "54,304 (4,864 trained, 8.96%) parameters" in (trained / "log.txt").read_text()


def test_only_the_adapters_change_and_averages_are_of_all(trained: Path, base: Path) -> None:
    before, after = (runs.contents(checkpoint(run, step)) for run, step in ((base, 8), (trained, 4)))
    weights = [key for key in before if not key.startswith(("optimizer.", "random")) and torch.is_tensor(before[key])]
    assert "decoder.layers.mlp.linear_fc1.weight" in weights
    for key in weights:
        assert after[key].equal(before[key]), key
        assert after[f"ema.{key}"].equal(before[key]), f"{key}: what is frozen is its own average"
    moments = {key for key in after if key.startswith("optimizer.state.exp_avg.")}
    assert moments and all("_adapter.lora_" in key for key in moments)
    for factor in "ab":
        assert after[f"decoder.layers.mlp.linear_fc1_adapter.lora_{factor}"].any()


def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(
    tmp_path: Path, data: dict[str, Path], base: Path, trained: Path
) -> None:
    stopped, given = tmp_path / "stopped", options(base, TP2, SP)
    assert runs.train(stopped, data["preference"], 2, *given, "train.exit_interval=2") == 75
    assert runs.train(stopped, data["preference"], 2, *given) == 0
    assert runs.losses(stopped) == runs.losses(trained)
    assert runs.differences(*(runs.contents(checkpoint(run, 4)) for run in (stopped, trained))) == []


@pytest.fixture(scope="module")
def exported(trained: Path, base: Path) -> Path:
    """Merged, and both models and the adapters as others read them."""
    out = trained.parent
    commands: list[list[Any]] = [
        ["checkpoint", "merge-lora", trained, "--output", out / "merged"],
        ["convert", "peft-export", trained, "--output", out / "peft", "--base", out / "base-hf"],
        ["convert", "hf-export", base, "--output", out / "base-hf", "--no-logits"],
        ["convert", "hf-export", out / "merged", "--output", out / "merged-hf", "--no-logits"],
    ]
    for code, said in mslm([[str(word) for word in command] for command in commands]):
        assert code == 0, said
    return out


def ours(cases: dict[str, Path], **degrees: int) -> dict[str, torch.Tensor]:
    """Logits [S, V] of checkpoints after ``PROMPT``."""
    ranks = degrees.get("tensor_model_parallel_size", 1)
    found: dict[str, torch.Tensor] = run_ranks(logits_under, ranks, ParallelConfig(**degrees), cases, PROMPT)[0]
    return found


def test_merged_weights_compute_what_the_adapters_add(trained: Path, exported: Path, base: Path) -> None:
    cases = {"adapters": checkpoint(trained, 4), "merged": exported / "merged", "base": checkpoint(base, 8)}
    one, two = ours(cases), ours(cases, tensor_model_parallel_size=2)
    scale = one["merged"].abs().max()
    assert (one["adapters"] - one["merged"]).abs().max() <= 1e-6 * scale
    assert (two["adapters"] - one["merged"]).abs().max() <= 1e-6 * scale
    assert (one["adapters"] - one["base"]).abs().max() > 1e-2 * scale


def test_transformers_computes_the_merged_model(trained: Path, exported: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(exported / "merged-hf", dtype=torch.float32).eval()
    expected = ours({"adapters": checkpoint(trained, 4)})["adapters"]
    with torch.no_grad():
        found = model(PROMPT).logits[0]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_adapters_of_peft_files_are_added_to_the_base_by_hand(exported: Path) -> None:
    """Without the package: names, shapes and rows as PEFT's own ``merge`` reads them."""
    import json

    from safetensors.torch import load_file

    described = json.loads((exported / "peft" / "adapter_config.json").read_text())
    scale = described["lora_alpha"] / described["r"]
    tensors = load_file(exported / "peft" / "adapter_model.safetensors")
    before, after = (load_file(exported / name / "model.safetensors") for name in ("base-hf", "merged-hf"))
    changed = set()
    for name in [key for key in tensors if key.endswith(".lora_A.weight")]:
        weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
        first, second = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
        expected = before[weight].double() + scale * second @ first
        torch.testing.assert_close(after[weight].double(), expected, rtol=1e-6, atol=1e-7)
        changed.add(weight)
        assert weight.split(".")[-2] in described["target_modules"]
    assert len(changed) == 2 * 7, "q k v o, gate up down"
    assert all(after[key].equal(before[key]) for key in before.keys() - changed)


def test_peft_computes_the_trained_model(trained: Path, exported: Path) -> None:
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(exported / "peft", dtype=torch.float32).eval()
    expected = ours({"adapters": checkpoint(trained, 4)})["adapters"]
    with torch.no_grad():
        found = model(PROMPT).logits[0]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_reward_model_keeps_its_head(tmp_path: Path, data: dict[str, Path], base: Path) -> None:
    given = (*options(base)[:-1], "train.train_iters=1", "stage=reward")
    run, merged = tmp_path / "reward", tmp_path / "merged"
    assert runs.train(run, data["preference"], 1, *given) == 0
    said = mslm(
        [
            ["checkpoint", "merge-lora", str(run), "--output", str(merged)],
            ["convert", "peft-export", str(run), "--output", str(tmp_path / "peft")],
        ]
    )
    assert [code for code, _ in said] == [0, 2] and "head" in said[1][1]
    before, after = runs.contents(checkpoint(run, 1)), runs.contents(merged)
    assert after["value_head.weight"].any() and after["value_head.weight"].equal(before["value_head.weight"])
    assert not any("_adapter" in key or key.startswith(("optimizer.", "ema.")) for key in after)


def test_what_cannot_be_is_refused(
    tmp_path: Path, data: dict[str, Path], trained: Path, exported: Path, base: Path
) -> None:
    out = str(tmp_path / "out")
    said = mslm(
        [
            ["checkpoint", "merge-lora", str(base), "--output", out],
            ["convert", "peft-export", str(base), "--output", out],
            ["convert", "hf-export", str(trained), "--output", out],
            ["checkpoint", "merge-lora", str(trained), "--output", str(exported / "merged")],
        ]
    )
    for (code, text), word in zip(said, ("no adapters", "no adapters", "merge-lora", "exists"), strict=True):
        assert code == 2 and word in text, text
    assert not Path(out).exists()
    with pytest.raises(RankFailure, match="merge-lora"):
        runs.train(tmp_path / "run", data["preference"], 1, *options(trained))
