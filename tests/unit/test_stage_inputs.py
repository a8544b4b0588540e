"""What a stage is refused for before anything is built: data of the wrong kind, no room for answers, no such model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.cli import main
from megatron_slm.config.files import missing_inputs
from megatron_slm.config.load import load


def split(directory: Path, **index: Any) -> str:
    """A directory whose training split has this index."""
    (directory / "train").mkdir(parents=True)
    (directory / "train" / "index.json").write_text(json.dumps({"vocab_size": 300, **index}))
    return str(directory)


def examples(directory: Path, kind: str, longest: int = 1) -> str:
    return split(directory, kind=kind, examples_version=1, longest=longest)


def missing(stage: str, path: str, *overrides: str) -> list[str]:
    resolved = load(None, [f"stage={stage}", f"data.data_path={path}", "model.seq_length=64", *overrides])
    return missing_inputs(resolved.config, provenance=resolved.provenance)


KINDS = {"chat": ("sft", "distill"), "preference": ("reward", "dpo"), "prompt": ("ppo", "grpo"), "text": ("pretrain",)}


def test_each_stage_takes_its_kind_alone(tmp_path: Path) -> None:
    made = {kind: examples(tmp_path / kind, kind) for kind in ("chat", "preference", "prompt")}
    made["text"] = split(tmp_path / "text")
    for kind, path in made.items():
        for wanted, stages in KINDS.items():
            for stage in stages:
                found = missing(stage, path)
                if kind == wanted or (kind == "text" and wanted == "chat"):
                    assert found == [], (stage, kind)
                else:
                    (one,) = found
                    assert f"stage = {stage}" in one and "data.data_path" in one and "\n" not in one, (stage, kind)
                    assert f"set stage={KINDS[kind][0]}" in one
                    assert ("--kind" if wanted != "text" else "mslm data prepare") in one


def test_the_wrong_one_of_several_sources_is_named(tmp_path: Path) -> None:
    chat, prompt = examples(tmp_path / "chat", "chat"), examples(tmp_path / "prompt", "prompt")
    resolved = load(None, ["stage=sft", f"data.sources=a={chat},b={prompt}"])
    (one,) = [each for each in missing_inputs(resolved.config) if "stage reads" in each]
    assert prompt in one and "holds prompt examples" in one


def test_prompt_and_answer_must_fit(tmp_path: Path) -> None:
    path = examples(tmp_path / "prompt", "prompt", longest=33)
    assert missing("grpo", path, "rollout.max_new_tokens=32") == []
    (long,) = missing("grpo", path, "rollout.max_new_tokens=33")
    assert "Set rollout.max_new_tokens=32" in long and "--seq-length 32" in long
    # A reward model reads the answer's last token too.
    reward = tmp_path / "rm"
    reward.mkdir()
    (reward / "config.yaml").write_text("stage: reward\n")
    (one,) = missing("grpo", path, "rollout.max_new_tokens=32", f"rollout.reward_model={reward}")
    assert "Set rollout.max_new_tokens=31" in one
    path = examples(tmp_path / "longer", "prompt", longest=80)
    (none,) = missing("grpo", path, "rollout.max_new_tokens=8")
    assert "Set model.seq_length=88" in none


def test_other_models_must_be_there_and_a_reward_model_be_one(tmp_path: Path) -> None:
    prompt, chat = examples(tmp_path / "prompt", "prompt"), examples(tmp_path / "chat", "chat")
    for key, stage, path in (
        ("rollout.reward_model", "ppo", prompt),
        ("ppo.ppo_critic_checkpoint", "ppo", prompt),
        ("distill.distill_teacher", "distill", chat),
    ):
        (one,) = missing(stage, path, "rollout.max_new_tokens=4", f"{key}={tmp_path / 'no'}")
        assert one.startswith(f"{key} = ") and "no such directory" in one
    words = tmp_path / "words"
    (words / "checkpoints").mkdir(parents=True)
    (words / "config.yaml").write_text("stage: sft\n")
    for place in (words, words / "checkpoints"):
        (one,) = missing("ppo", prompt, "rollout.max_new_tokens=4", f"rollout.reward_model={place}")
        assert "was trained with stage sft" in one


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("rollout.rewards=exct_match=1", "rollout.rewards: 'exct_match' is no verifier: did you mean exact_match"),
        ("rollout.rewards=exact_match=much", "rollout.rewards holds 'exact_match=much'; write NAME=WEIGHT"),
        ("rollout.rewards=no/such.py:judge=1", "rollout.rewards names a function of no/such.py, and there is no such"),
        ("rollout.rewards=model=1", "give rollout.reward_model=RUN too"),
    ],
)
def test_check_refuses_rewards_that_nothing_gives(
    given: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = examples(tmp_path / "prompt", "prompt")
    assert main(["check", "stage=grpo", "name=x", f"data.data_path={path}", "rollout.max_new_tokens=4", given]) == 2
    found = capsys.readouterr().err.splitlines()
    assert [line for line in found if said in line] and len(found) == 2, found


def test_what_is_not_there_is_to_be_made_with_the_command_of_its_kind(tmp_path: Path) -> None:
    (one,) = missing("dpo", str(tmp_path / "no"), f"checkpoint.pretrained_checkpoint={tmp_path}")
    assert "mslm data examples ROWS.jsonl --kind preference" in one
