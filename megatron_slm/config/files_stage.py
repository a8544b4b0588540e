"""The files that a stage after pretraining reads before its first step: are they there, and what the stage reads?

Only indices and configurations are opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_slm.config import mixture_text
from megatron_slm.config.facts import Facts
from megatron_slm.errors import ConfigError

KIND = {
    "sft": "chat",
    "distill": "chat",
    "reward": "preference",
    "dpo": "preference",
    "ppo": "prompt",
    "grpo": "prompt",
}
"""What ``mslm data examples --kind`` is to make for a stage."""
TEXT = "text"
ALSO_TEXT = ("sft", "distill")
"""Stages that read a prepared corpus beside examples."""
MODELS = ("rollout.reward_model", "distill.distill_teacher", "ppo.ppo_critic_checkpoint")


def stage_inputs(facts: Facts) -> Iterator[str]:
    """Data of the kind that the stage reads, prompts that leave room for answers, models that are there."""
    for key, path in _sources(facts):
        if (index := index_of(path)) is not None:
            yield from _kind(facts, key, path, index)
            yield from _room(facts, key, index)
    for key in MODELS:
        path = facts.value(key)
        if path is not None and not Path(path).is_dir():
            yield f"{facts.cite(key)}: there is no such directory. Name a run (runs/NAME) or one of its checkpoints."
    yield from _reward_model(facts)


def preparation(stage: str) -> str:
    """The command that makes data for a stage, with a place ``{path}`` for its output."""
    if stage not in KIND:
        return "mslm data prepare TEXT.jsonl --output {path}"
    return f"mslm data examples ROWS.jsonl --kind {KIND[stage]} --output {{path}}"


def index_of(path: str) -> dict[str, Any] | None:
    """The index of the training split in ``path``; None where it cannot be read, of which another rule speaks."""
    try:
        index = json.loads((Path(path) / "train" / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return index if isinstance(index, dict) else None


def _sources(facts: Facts) -> list[tuple[str, str]]:
    """Each source's option and path."""
    data = facts.config.data
    if data.sources:
        try:
            return [("data.sources", path) for path in mixture_text.sources(data.sources).values()]
        except ConfigError:
            return []  # a rule on the configuration speaks already
    return [("data.data_path", data.data_path)] if data.data_path is not None else []


def _kind(facts: Facts, key: str, path: str, index: Mapping[str, Any]) -> Iterator[str]:
    stage = facts.config.stage
    held = index.get("kind") if "examples_version" in index else TEXT
    wanted = KIND.get(stage, TEXT)
    if held == wanted or (held == TEXT and stage in ALSO_TEXT):
        return
    known = {made: [one for one, kind in KIND.items() if kind == made] for made in KIND.values()} | {TEXT: ["pretrain"]}
    others = " or ".join(known.get(str(held), []))
    instead = f", or set stage={others}" if others else ""
    made = preparation(stage).format(path="DIRECTORY")
    yield (
        f"{facts.cite(key, 'stage')}: {path} holds {_words(held)}, but the stage reads {_words(wanted)}. Make them "
        f"with `{made}`{instead}."
    )


def _words(kind: Any) -> str:
    return "a corpus of text" if kind == TEXT else f"{kind} examples"


def _room(facts: Facts, key: str, index: Mapping[str, Any]) -> Iterator[str]:
    """The longest prompt and the longest answer fit into a sequence."""
    config, limit, longest = facts.config, "rollout.max_new_tokens", index.get("longest")
    length, new = config.model.seq_length, config.rollout.max_new_tokens
    if config.stage not in ("ppo", "grpo") or index.get("kind") != "prompt" or not isinstance(longest, int):
        return
    # A reward model reads the last token of an answer too; the policy itself has no use for it.
    room = length if config.rollout.reward_model is not None else length + 1
    if longest + new <= room:
        return
    shorter = f"{limit}={room - longest}" if longest < room else f"model.seq_length={longest + new}"
    again = f", or compile the prompts again with --seq-length {room - new}" if new < room else ""
    yield (
        f"{facts.cite(key)}: its longest prompt has {longest} tokens, which with {facts.cite(limit)} is more than "
        f"{facts.cite('model.seq_length')}. Set {shorter}{again}."
    )


def _reward_model(facts: Facts) -> Iterator[str]:
    """It ends with a number, as its configuration says."""
    key = "rollout.reward_model"
    path = facts.value(key)
    if path is None or (stage := _stage_of(Path(path))) in (None, "reward"):
        return
    yield f"{facts.cite(key)} was trained with stage {stage}, which ends with words. Give a run of stage=reward."


def _stage_of(path: Path) -> str | None:
    """The stage of a run or checkpoint; None where nothing tells."""
    for place in (path, path.parent):
        try:
            found = yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            continue
        return str(found.get("stage", "pretrain")) if isinstance(found, dict) else None
    return None
