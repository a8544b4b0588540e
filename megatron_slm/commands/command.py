"""What every verb of ``mslm`` is made of: its parser, and the configuration its tokens describe. No torch."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from megatron_slm.errors import ConfigError

if TYPE_CHECKING:
    from megatron_slm.config.load import Resolved
    from megatron_slm.config.run_config import RunConfig

EXIT_OK = 0
EXIT_REFUSED = 2

OVERRIDES = """\
CONFIG is a YAML file; key=value (model.num_layers=4) and Megatron's flags (--num-layers 4) override it, in any order.
Precedence: defaults < preset < CONFIG < command line. Every key is described in docs/config.md."""


@dataclass(frozen=True)
class Verb:
    """One thing that ``mslm`` can do."""

    summary: str
    run: Callable[[str, Sequence[str]], int]
    """Takes the verb's name and the tokens after it; returns the exit code."""


def resolve(tokens: Sequence[str]) -> Resolved:
    """The configuration that ``[CONFIG] [overrides]`` describes."""
    from megatron_slm.config.load import load

    return load(*sources(tokens))


def sources(tokens: Sequence[str]) -> tuple[Path | None, tuple[str, ...]]:
    """``[CONFIG] [overrides]`` -> the file, if one is named, and the overrides."""
    from megatron_slm.config import flags

    typed = flags.read(tokens)
    if len(typed.positionals) > 1:
        raise ConfigError(
            f"One CONFIG is read, but {len(typed.positionals)} were given: {', '.join(typed.positionals)}. Values are "
            "written key=value or --flag value."
        )
    return Path(typed.positionals[0]) if typed.positionals else None, typed.overrides


def violations_of(resolved: Resolved, world_size: int | None, *, files: bool) -> list[str]:
    """Every violated rule, and every missing input file."""
    from megatron_slm.config.files import missing_inputs
    from megatron_slm.config.rules import violations

    found = violations(resolved.config, world_size, provenance=resolved.provenance)
    found += _reward_problems(resolved.config, files=files)
    return found + (missing_inputs(resolved.config, provenance=resolved.provenance) if files else [])


def _reward_problems(config: RunConfig, *, files: bool) -> list[str]:
    """Why the rewards of a run that learns from some cannot be what they are to be. No file of the user's is run."""
    if config.stage not in ("ppo", "grpo") or not (config.rollout.rewards or config.rollout.watched):
        return []
    from megatron_slm.evaluate.rewards import parts_of

    try:
        parts = parts_of(config.rollout)
    except ConfigError as error:
        return [str(error)]
    named = {
        Path(part.verifier.rpartition(":")[0]): "rewards" if part.weight is not None else "watched"
        for part in reversed(parts)
        if ":" in part.verifier
    }
    return [
        f"rollout.{key} names a function of {file}, and there is no such file. Check the path."
        for file, key in named.items()
        if files and not file.is_file()
    ]


def accepted(tokens: Sequence[str], world_size: int | None) -> Resolved:
    """The configuration, refused if it breaks any rule."""
    resolved = resolve(tokens)
    if found := violations_of(resolved, world_size, files=True):
        raise ConfigError("\n".join(found))
    return resolved


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that its workers are ended too; the exit code is a shell's, 143."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        print("mslm: terminated", file=sys.stderr)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def path_of(text: str) -> Path:
    """The type of an argument that is a path.

    Raises:
        ConfigError: it is empty, which Python would take for the current directory.
    """
    if not text:
        raise ConfigError(
            'A path on the command line is empty, as "$NAME" is when NAME is not set. Give it, or . for the current '
            "directory."
        )
    return Path(text)


def parser_of(name: str, arguments: str, description: str, *, example: str, notes: str = "") -> argparse.ArgumentParser:
    """The parser of one verb; what it does not know is a key of the configuration."""
    return argparse.ArgumentParser(
        prog=f"mslm {name}",
        usage=f"mslm {name} {arguments}",
        description=textwrap.fill(description, 118),
        epilog="\n\n".join(filter(None, (notes, f"example:\n  {example}"))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
