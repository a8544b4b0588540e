"""Where the batches of a step that is made again come from: the corpora, or what the recording has kept. No torch."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_slm.config import mixture_text
from megatron_slm.config.load import Resolved
from megatron_slm.config.run_config import STAGES
from megatron_slm.errors import ReplayError
from megatron_slm.replay.capsule import Capsule
from megatron_slm.train.config import CheckpointConfig

FOLDER = "batches"
TOKENIZER = "tokenizer"
READ = dict.fromkeys(STAGES, "from its examples") | {"pretrain": "from the corpora"}
"""Where a stage's batches come from while its data are there, in words."""
DRAWING = ("ppo", "grpo")
"""Stages whose batches are drawn: what a step leaves in the rollout and the critic is not in its batch."""
_DRAWN = (
    "--kept-batches: {name} is of the stage {stage}, whose steps train on answers that a checkpoint holds or a policy "
    "draws. Leave it out: prompts and models are read again, and the same answers are drawn. In replay/batches are the "
    "micro-batches of the policy's updates, to be looked at with torch.load."
)
_OLDER = (
    "--kept-batches: {name} (stage {stage}) was recorded by an older version, which did not note where its examples "
    "lay. Leave it out, or record the run again."
)


def batch_path(folder: Path, rank: int, step: int) -> Path:
    """Where a rank's batch of a step lies."""
    return folder / FOLDER / f"rank_{rank:05d}_step_{step:07d}.pt"


def kept_steps(folder: Path, rank: int) -> list[int]:
    """Steps whose batches of a rank are there, in their order."""
    pattern = re.compile(rf"rank_{rank:05d}_step_(\d+)\.pt")
    found = (pattern.fullmatch(entry.name) for entry in (folder / FOLDER).glob(f"rank_{rank:05d}_step_*.pt"))
    return sorted(int(match[1]) for match in found if match)


def with_inputs(
    resolved: Resolved, recording: Capsule, steps: Sequence[int], *, kept: bool = False
) -> tuple[Resolved, str]:
    """The configuration with inputs that are there, and in words which: for ``steps``, made one after the other.

    The corpora are read where they are what they were; else, or with ``kept``, the batches that the recording has kept.

    Raises:
        ReplayError: neither is there; names what is missing of each, and the way out.
    """
    config, manifest = resolved.config, recording.manifest(steps[-1])
    sources = manifest["data"]["sources"]
    if config.stage in DRAWING or not _placed(sources):  # an older version noted no place of examples
        if kept:
            why = _DRAWN if config.stage in DRAWING else _OLDER
            raise ReplayError(why.format(name=config.name, stage=config.stage))
        return resolved, READ[config.stage]
    tokenizer = dataclasses.replace(
        config.tokenizer, tokenizer_model=kept_tokenizer(recording.folder) or config.tokenizer.tokenizer_model
    )
    resolved = _with(resolved, tokenizer=tokenizer, checkpoint=_origin(config.checkpoint, first=steps[0] == 1))
    missing = ["--kept-batches: the corpora are not read"] if kept else corpora_missing(sources, config.data.replay_run)
    if not missing:
        return _located(resolved, sources), READ[config.stage]
    gone = batches_missing(recording, steps)
    if "cursor" not in manifest or kept_tokenizer(recording.folder) is None:
        gone.append(f"{recording.folder} was recorded by an older version, which kept no tokenizer and no cursor")
    if gone:
        anew = "; no checkpoint before it is left" if steps[0] == 1 else ""
        raise ReplayError(
            "\n".join(
                [
                    f"Steps {steps[0]} to {steps[-1]} cannot be made again{anew}, and their samples are nowhere:",
                    *(f"  {line}" for line in (*missing, *gone)),
                    "Bring the corpora back to where they were, choose a later step or one nearer behind a checkpoint, "
                    "or record with replay.keep_batches of at least checkpoint.save_interval.",
                ]
            )
        )
    return _kept_alone(resolved, recording), "from the batches that were kept"


def from_corpora(resolved: Resolved, sources: Mapping[str, Any]) -> Resolved:
    """The configuration with its corpora where a record of them says they were.

    Raises:
        ReplayError: names what is not there any more as it was.
    """
    if not _placed(sources):
        return resolved
    if missing := corpora_missing(sources, resolved.config.data.replay_run):
        raise ReplayError(
            "\n".join(
                [
                    f"{resolved.config.name} cannot be made again:",
                    *(f"  {line}" for line in missing),
                    "Bring them back.",
                ]
            )
        )
    return _located(resolved, sources)


def _placed(sources: Mapping[str, Any]) -> bool:
    """Whether a record says where each source lies."""
    return all("directory" in record or name == mixture_text.REPLAY for name, record in sources.items())


def kept_tokenizer(folder: Path) -> str | None:
    """The copy of the run's tokenizer."""
    found = sorted((folder / TOKENIZER).glob("tokenizer.*"))
    return str(found[0].absolute()) if found else None


def _kept_alone(resolved: Resolved, recording: Capsule) -> Resolved:
    """The configuration of a run that reads the recording's batches and no corpus, and so cannot validate."""
    config = resolved.config
    return _with(
        resolved,
        data=dataclasses.replace(config.data, loss_aware_strength=0.0),
        train=dataclasses.replace(config.train, eval_iters=0, eval_interval=None, early_stopping_patience=None),
        replay=dataclasses.replace(config.replay, batches_of=str(recording.folder.absolute())),
    )


def corpora_missing(sources: Mapping[str, Any], replay_run: str | None) -> list[str]:
    """A sentence for every source whose corpus is not what a manifest says of it, where it says it is."""
    found = []
    for name, record in sources.items():
        if name == mixture_text.REPLAY and replay_run is not None:
            if not Path(replay_run).is_dir():
                found.append(f"data.replay_run={replay_run}: there is no such directory")
            continue
        index = Path(record["directory"]) / "train" / "index.json"
        try:
            digest = json.loads(index.read_text(encoding="utf-8"))["digest"]
        except (OSError, ValueError, KeyError, TypeError):
            found.append(f"corpus {name}: {record['directory']} is gone or damaged")
            continue
        if digest != record.get("content", record["digest"]):
            found.append(f"corpus {name}: {record['directory']} holds other tokens than were recorded")
    return found


def batches_missing(recording: Capsule, steps: Sequence[int]) -> list[str]:
    """A sentence for the first rank of which batches are not there."""
    for rank in recording.ranks:
        kept = kept_steps(recording.folder, rank)
        if missing := sorted({*steps} - {*kept}):
            there = f"of steps {kept[0]} to {kept[-1]}" if kept else "of no step"
            return [f"kept batches: rank {rank} has those {there}, and step {missing[0]} is needed"]
    return []


def _origin(checkpoint: CheckpointConfig, *, first: bool) -> CheckpointConfig:
    """Without the weights that the run began with, where a later checkpoint replaces them.

    Raises:
        ReplayError: they are needed and are not there.
    """
    source = checkpoint.pretrained_checkpoint
    if source is None or Path(source).is_dir():
        return checkpoint
    if first:
        raise ReplayError(
            f"The run began with the weights of {source}, which are not there, and no checkpoint of its own before the "
            "step is left. Bring them back, or choose a step behind a checkpoint."
        )
    return dataclasses.replace(checkpoint, pretrained_checkpoint=None)


def _located(resolved: Resolved, sources: Mapping[str, Any]) -> Resolved:
    data = resolved.config.data
    return _with(resolved, data=dataclasses.replace(data, **_directories(sources, bool(data.sources))))


def _directories(sources: Mapping[str, Any], named: bool) -> dict[str, Any]:
    """Where the corpora were when the run was recorded: a path of its configuration may have been relative."""
    known = {name: record["directory"] for name, record in sources.items() if "directory" in record}
    if named:
        return {"sources": tuple(f"{name}={path}" for name, path in known.items())}
    return {"data_path": next(iter(known.values()))}


def _with(resolved: Resolved, **sections: Any) -> Resolved:
    return Resolved(dataclasses.replace(resolved.config, **sections), resolved.provenance)
