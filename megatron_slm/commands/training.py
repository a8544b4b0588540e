"""The verbs around training: train, check."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_slm.commands import downscaled, restart
from megatron_slm.commands.command import (
    EXIT_OK,
    EXIT_REFUSED,
    OVERRIDES,
    Verb,
    accepted,
    parser_of,
    resolve,
    sources,
    violations_of,
)
from megatron_slm.config import mixture_text
from megatron_slm.errors import ConfigError

if TYPE_CHECKING:
    from megatron_slm.config.load import Resolved
    from megatron_slm.data.config import DataConfig
    from megatron_slm.launch.environment import RankEnvironment

RANGE_TEST, DEFAULT_RANGE = "--lr-range-test", "1e-7:1"


def train(name: str, tokens: Sequence[str]) -> int:
    """``mslm train``: every rank runs this under a launcher; without one, this process starts the ranks."""
    parser = parser_of(
        name,
        "[CONFIG] [key=value | --flag ...] [--fresh | --lr-range-test [LOW:HIGH] | --downscale [--ranks N]] "
        "[--restarts N]",
        "Train a model. A run whose directory exists is resumed. Under torchrun, srun or mpirun every process is one "
        "rank; otherwise mslm starts the ranks on this machine.",
        example="mslm train --preset tiny --data-path corpus --train-iters 100",
        notes=OVERRIDES,
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--fresh", action="store_true", help="move an existing run of this name aside and start anew")
    choice.add_argument(
        RANGE_TEST,
        metavar="LOW:HIGH",
        help=f"instead, raise the learning rate from LOW to HIGH (default {DEFAULT_RANGE}) over train.train_iters "
        "steps, draw the loss against it and suggest a rate; in a run directory of its own, NAME-lr-range-test",
    )
    downscaled.add_options(
        choice,
        parser,
        "instead, shrink the job to a few ranks of this machine with its structure kept, print what was changed, and "
        "train that for a few steps; in runs of their own below NAME-downscaled, started anew each time",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="start the ranks of this machine again from the newest checkpoint, at most N times over the run's life, "
        "when one dies or all hang; a crash loop is recognised and ends it",
    )
    own, rest = parser.parse_known_args(_with_range(tokens))
    if own.restarts < 0:
        raise ConfigError(f"--restarts {own.restarts}: give how often the ranks may be started again, 0 for never")
    from megatron_slm.launch.environment import from_environment

    environment = from_environment(os.environ)
    if (ranks := downscaled.ranks_of(own)) is not None:
        return _train_downscaled(rest, ranks, own, environment)
    if environment is None:
        resolved = accepted(rest, None)

        def start(again: bool, heard: Callable[[str], None]) -> int:
            chosen = argparse.Namespace(**{**vars(own), "fresh": own.fresh and not again})
            return start_ranks(resolved, ["train", *tokens], chosen, heard)

        return restart.until_done(resolved, own.restarts, start)
    if own.restarts:
        raise ConfigError(
            f"--restarts starts the ranks of this machine again, but {environment.launcher} has started this one; let "
            "that launcher do so (torchrun --max-restarts, launch/slurm.sh)"
        )
    from megatron_slm.launch.rank import run_rank

    def entry(environment: RankEnvironment) -> int:
        return _train_rank(accepted(rest, environment.world_size), environment, own)

    return run_rank(environment, entry)


def check(name: str, tokens: Sequence[str]) -> int:
    """``mslm check``: every refused value and violated rule at once, without torch."""
    parser = parser_of(
        name,
        "[CONFIG] [key=value | --flag ...] [--skip-files | --downscale [--ranks N]] [--deep]",
        "Check a configuration: list every violated rule, or say how the job would be divided. Exit code 2 if any rule "
        "is violated.",
        example="mslm check --preset llama3-8b --tensor-model-parallel-size 8 --skip-files",
        notes=OVERRIDES,
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--skip-files", action="store_true", help="do not look for the corpus and other input files")
    downscaled.add_options(choice, parser, "show instead what `mslm train --downscale` would change")
    parser.add_argument(
        "--deep", action="store_true", help="play every role of the job without values: what would stop it? (seconds)"
    )
    own, rest = parser.parse_known_args(tokens)
    from megatron_slm.config.load import examine

    if (ranks := downscaled.ranks_of(own)) is not None:
        resolved = resolve(rest)
        print(downscaled.shown(resolved, *downscaled.planned(resolved, ranks)))
        return EXIT_OK

    resolved, problems = examine(*sources(rest))
    found = violations_of(resolved, None, files=not own.skip_files)
    if problems or found:
        counts = []
        if problems:
            counts.append(f"{len(problems)} problem{'s' * (len(problems) > 1)} in keys and values")
        if found:
            left_out = ", with those keys as if they were not given" if problems else ""
            counts.append(f"{len(found)} rule{'s' * (len(found) > 1)} violated{left_out}")
        print("\n".join([*problems, *found, "; ".join(counts)]), file=sys.stderr)
        return EXIT_REFUSED
    print(_summary(resolved))
    return _play_roles(resolved) if own.deep else EXIT_OK


def _play_roles(resolved: Resolved) -> int:
    """``mslm check --deep``: a step of every role in the dry world."""
    from megatron_slm.parallel.device import preload

    preload("cpu")
    from megatron_slm.run_dry import deep_check

    played: list[str] = []
    problems = deep_check(resolved.config, say=played.append)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return EXIT_REFUSED
    print(f"played a step of {len(played)} ranks, which stand for all: {'; '.join(played)}")
    return EXIT_OK


def _with_range(tokens: Sequence[str]) -> list[str]:
    """The tokens, with the range that ``--lr-range-test`` has when none follows: argparse would take CONFIG for it."""
    filled: list[str] = []
    for token, following in zip(tokens, [*tokens[1:], ""], strict=True):
        filled.append(token)
        if token == RANGE_TEST and (":" not in following or "=" in following):
            filled.append(DEFAULT_RANGE)
    return filled


def start_ranks(
    resolved: Resolved,
    command: Sequence[str],
    own: argparse.Namespace,
    heard: Callable[[str], None] = lambda said: None,
) -> int:
    """Start the ranks on this machine and wait for them.

    Args:
        command: the verb with its tokens, for ranks that cannot be forked.
        own: the options of ``train``.
        heard: is told what is said about the end of the ranks.
    """
    from megatron_slm.launch.local import run_local
    from megatron_slm.parallel.device import choose_device, preload

    parallel = resolved.config.parallel
    world_size = parallel.world_size or parallel.smallest_world_size
    if resolved.config.train.deterministic:
        _require_deterministic(resolved, choose_device(parallel.device), world_size)

    def preload_run() -> None:
        preload("cpu")
        # Once here instead of once in every rank; torch's first optimizer asks for torch._dynamo.
        import torch._dynamo  # noqa: F401

        import megatron_slm.run  # noqa: F401

    def entry(environment: RankEnvironment) -> int:
        return _train_rank(resolved, environment, own)

    return run_local(
        world_size,
        entry,
        preload=preload_run,
        warm=lambda: choose_device(parallel.device) == "cpu",
        command=[sys.executable, "-m", "megatron_slm.cli", *command],
        heard=heard,
    )


def _require_deterministic(resolved: Resolved, device: str, world_size: int) -> None:
    """Refuse what every rank would refuse, before the launcher has chosen their threads.

    Raises:
        ConfigError: a source of nondeterminism is active.
    """
    from megatron_slm.parallel.device import preload

    preload(device)
    from megatron_slm.doctor import determinism

    determinism.require(determinism.target_of(resolved.config, device, world_size, os.environ))


def _train_downscaled(
    tokens: Sequence[str], ranks: int, own: argparse.Namespace, environment: RankEnvironment | None
) -> int:
    """Train the small runs of a large job, on ranks that this process starts.

    Raises:
        ConfigError: a launcher has started the ranks already, or the job is refused.
    """
    if environment is not None:
        raise ConfigError(
            f"--downscale starts ranks of its own on this machine, but {environment.launcher} started this process as "
            "one. Run mslm train --downscale without a launcher."
        )
    anew = argparse.Namespace(**{**vars(own), "fresh": True})
    return downscaled.train(resolve(tokens), ranks, lambda resolved: start_ranks(resolved, ["train"], anew))


def _train_rank(resolved: Resolved, environment: RankEnvironment, own: argparse.Namespace) -> int:
    """The work of one rank; ``own`` holds the verb's own options."""
    from megatron_slm.parallel.device import choose_device, preload

    # Core must fit the device before any of our modules takes a name out of it.
    preload(choose_device(resolved.config.parallel.device))
    if own.lr_range_test is not None:
        from megatron_slm import run_lr_range

        return run_lr_range.range_test(resolved, environment, own.lr_range_test)
    from megatron_slm import run

    return run.train(resolved, environment, fresh=own.fresh)


def _summary(resolved: Resolved) -> str:
    """How an accepted job would be divided."""
    from megatron_slm.model.counts import flops_per_token, parameters_text
    from megatron_slm.parallel.layout import Layout, layer_split

    config, parallel, train = resolved.config, resolved.config.parallel, resolved.config.train
    layout = Layout.from_config(parallel, parallel.world_size or parallel.smallest_world_size)
    split = layer_split(config.model.num_layers, parallel)
    degrees = " x ".join(f"{axis} {size}" for axis, size in layout.sizes.items())
    microbatches = layout.num_microbatches(train.global_batch_size, train.micro_batch_size)
    step = f"{microbatches}, each of {train.micro_batch_size} x {config.model.seq_length} tokens"
    lines = [
        f"ok: {config.name} ({config.stage})",
        f"ranks: {layout.world_size} = {degrees}",
        f"layers per pipeline stage: {', '.join('+'.join(map(str, chunks)) for chunks in split)}",
        f"micro-batches per step and replica: {step}",
    ]
    if config.model.vocab_size is not None:
        count = parameters_text(config.model, config.model.vocab_size, config.lora)
        flops = flops_per_token(config.model, config.model.vocab_size)
        lines.append(f"parameters: {count}; model FLOPs per token, forward and backward: {flops:.3e}")
    return "\n".join([*lines, *_rounded_shares(config.data)])


def _rounded_shares(data: DataConfig) -> Iterator[str]:
    """A line for every phase whose shares are not exactly those of the weights that were typed."""
    if not data.sources:
        return
    from megatron_slm.data.mixture import ROUNDED
    from megatron_slm.data.shares import configured_phases

    # Shares by size are nobody's weights, so any sizes will do here.
    for phase in configured_phases(data, dict.fromkeys(mixture_text.sources(data.sources), 1)):
        if phase.rounded and (phase.start or data.weights):
            yield f"shares from sample {phase.start} on: {phase.shares_text}; {ROUNDED}"


VERBS: Mapping[str, Verb] = {
    "train": Verb("train a model, or resume a run", train),
    "check": Verb("list every violated rule of a configuration, without torch", check),
}
