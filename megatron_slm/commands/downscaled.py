"""``--downscale`` of train and check: what is changed, and the small runs one after another on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slm.commands.command import EXIT_OK
from megatron_slm.errors import ConfigError

if TYPE_CHECKING:
    from megatron_slm.config.downscale import Downscaled
    from megatron_slm.config.load import Resolved
    from megatron_slm.config.run_config import RunConfig

DEFAULT_RANKS = 4
MADE_UP_VOCABULARY = 500
_SOURCE = "downscaled"


def add_options(choice: argparse._MutuallyExclusiveGroup, parser: argparse.ArgumentParser, does: str) -> None:
    """``--downscale`` as one of several choices, and ``--ranks``; ``does`` says what the verb does then."""
    choice.add_argument("--downscale", action="store_true", help=does)
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help=f"with --downscale, the most ranks of one run, 2 to 8 (default {DEFAULT_RANKS})",
    )


def ranks_of(own: argparse.Namespace) -> int | None:
    """The most ranks of a downscaled run; None where the job is taken as it is.

    Raises:
        ConfigError: ranks are given without ``--downscale``.
    """
    if own.ranks is not None and not own.downscale:
        raise ConfigError(
            f"--ranks {own.ranks} belongs to --downscale. A whole job has parallel.world_size ranks, or its launcher's."
        )
    return None if not own.downscale else DEFAULT_RANKS if own.ranks is None else own.ranks


def planned(resolved: Resolved, ranks: int) -> tuple[Downscaled, dict[str, Path]]:
    """The small runs of an accepted job, and the made-up corpora that stand in for those that are not here.

    Raises:
        ConfigError: the job breaks a rule, or a corpus that is here is damaged.
    """
    from megatron_slm.config.downscale import downscale
    from megatron_slm.config.rules import require

    config = resolved.config
    require(config, provenance=resolved.provenance)
    corpora = _corpora(config)
    if corpora is not None and _are_here(config, corpora):
        _require_whole(config, resolved.provenance)
        return downscale(config, ranks=ranks, tokenizer_size=_tokenizer_size(corpora)), {}
    return _with_made_up(config, downscale(config, ranks=ranks), list(corpora or {"corpus": ""}))


def shown(resolved: Resolved, small: Downscaled, made_up: Mapping[str, Path]) -> str:
    """What is changed, in which runs, and with which data."""
    from megatron_slm.config.downscale import axes_of

    lines = [f"{resolved.config.name} downscaled: {len(small.runs)} run(s) of one small model", small.table(), ""]
    for run in small.runs:
        ranks = run.parallel.world_size
        lines.append(f"run {run.name}: {ranks} rank(s), holds {', '.join(axes_of(run)) or 'no axis'}")
    if small.missed:
        pairs = ", ".join(" with ".join(pair) for pair in small.missed)
        lines.append(f"not held together by any run, because it takes more ranks: {pairs}")
    if made_up:
        lines.append("data: made-up tokens, because a corpus or tokenizer of this configuration is not on this machine")
    return "\n".join(lines)


def train(resolved: Resolved, ranks: int, start: Callable[[Resolved], int]) -> int:
    """Train the small runs one after another, each anew; what earlier ones have left is moved aside.

    Args:
        start: trains one configuration on ranks of this machine and returns its exit code.

    Returns:
        0 when every run reached its target, else the code of the first that did not.
    """
    code, runs = each(resolved, ranks, start)
    if code == EXIT_OK:
        print("\n" + _outcome(runs), flush=True)
    return code


def each(resolved: Resolved, ranks: int, start: Callable[[Resolved], int]) -> tuple[int, Sequence[RunConfig]]:
    """Say what is changed, make up what is missing, and call ``start`` with one small run after another.

    Returns:
        0, or the first other code, which ends it; and the small runs.
    """
    from megatron_slm.config.load import Resolved as ResolvedRun
    from megatron_slm.launch.local import threads_per_rank

    small, made_up = planned(resolved, ranks)
    print(shown(resolved, small, made_up), flush=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(ranks)))
    if made_up and (code := _make_up(made_up)) != EXIT_OK:
        return code, small.runs
    changed = {change.key for change in small.changes}
    provenance = {key: _SOURCE if key in changed else source for key, source in resolved.provenance.items()}
    for number, run in enumerate(small.runs, 1):
        print(f"\n=== {number} of {len(small.runs)}: {run.name} ===", flush=True)
        code = start(ResolvedRun(run, provenance))
        if code != EXIT_OK:
            return code, small.runs
    return EXIT_OK, small.runs


def _corpora(config: RunConfig) -> dict[str, str] | None:
    """Source -> directory; None where the configuration names no data."""
    from megatron_slm.config import mixture_text

    if config.data.sources:
        return mixture_text.sources(config.data.sources)
    return None if config.data.data_path is None else {"corpus": config.data.data_path}


def _are_here(config: RunConfig, corpora: Mapping[str, str]) -> bool:
    model = config.tokenizer.tokenizer_model
    return all(Path(path).is_dir() for path in corpora.values()) and (model is None or Path(model).is_file())


def _require_whole(config: RunConfig, provenance: Mapping[str, str]) -> None:
    """Refuse corpora that are here and cannot be read: made-up tokens would hide that.

    Raises:
        ConfigError: the message lists what is wrong.
    """
    from megatron_slm.config.files import missing_inputs

    kept = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, replay_run=None),
        checkpoint=dataclasses.replace(config.checkpoint, pretrained_checkpoint=None),
    )
    if found := missing_inputs(kept, provenance=provenance):
        raise ConfigError("\n".join(found))


def _tokenizer_size(corpora: Mapping[str, str]) -> int:
    """Entries of the tokenizer that the corpora were made with."""
    indices = [Path(path) / "train" / "index.json" for path in corpora.values()]
    return max(int(json.loads(index.read_text(encoding="utf-8"))["vocab_size"]) for index in indices)


def _with_made_up(config: RunConfig, small: Downscaled, names: Sequence[str]) -> tuple[Downscaled, dict[str, Path]]:
    """The runs on made-up corpora, one for each source; ``made_up`` names their directories."""
    from megatron_slm.config.downscale import with_changes

    place = Path(small.runs[0].log.runs_dir) / "made-up"
    made_up = {name: place / name for name in names}
    data: dict[str, Any] = (
        {"sources": tuple(f"{name}={path}" for name, path in made_up.items())}
        if config.data.sources
        else {"data_path": str(made_up[names[0]])}
    )
    runs = [
        dataclasses.replace(
            run,
            data=dataclasses.replace(run.data, **data),
            tokenizer=dataclasses.replace(run.tokenizer, tokenizer_model=None),
        )
        for run in small.runs
    ]
    return with_changes(config, runs, small.missed), made_up


def _make_up(made_up: Mapping[str, Path]) -> int:
    """Prepare the made-up corpora in a process of their own, and return its exit code.

    Here, the threads of the libraries that do it would be in the way of forking ranks.
    """
    from megatron_slm.launch.local import run_local

    def work(environment: object) -> int:
        from megatron_slm.data.made_up import prepare_made_up

        tokenizer = None
        for seed, path in enumerate(made_up.values()):
            made = prepare_made_up(path, vocab_size=MADE_UP_VOCABULARY, seed=seed, tokenizer_model=tokenizer)
            tokenizer = tokenizer or made
        return EXIT_OK

    return run_local(1, work, preload=lambda: None, warm=True)


def _outcome(runs: Sequence[RunConfig]) -> str:
    """First and last loss of every run, which are those of the same job under several layouts."""
    lines = ["run                   first loss   last loss   held-out   directory"]
    for run in runs:
        directory = Path(run.log.runs_dir) / str(run.name)
        steps = _records(directory / "metrics.jsonl")
        held_out = _records(directory / "validation.jsonl")
        losses = [steps[0]["lm_loss"], steps[-1]["lm_loss"]] if steps else [None, None]
        cells = [*losses, held_out[-1]["lm_loss"] if held_out else None]
        numbers = "".join(f"{'-' if loss is None else format(loss, '.4f'):>12}" for loss in cells)
        lines.append(f"{run.name or '':<20}{numbers}   {directory}")
    return "\n".join(lines)


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
