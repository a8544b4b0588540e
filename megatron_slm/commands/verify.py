"""The verb ``mslm verify``: n ranks against one."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_slm.commands.command import EXIT_OK, OVERRIDES, Verb, parser_of, path_of, resolve, violations_of
from megatron_slm.errors import ConfigError

EXIT_DIFFERS = 1


def verify(name: str, tokens: Sequence[str]) -> int:
    """``mslm verify``: whether the parallel job does what one rank does."""
    parser = parser_of(
        name,
        "[CONFIG] [key=value | --flag ...] [--ranks N] [--json FILE] [--verbose]",
        "Prove a configuration's parallelism: shrink it to this machine with its structure kept, run it on CPU ranks "
        "and on one rank, and compare losses, gradients, an optimizer step and a resume. No corpus and no GPU needed. "
        "Exit code 0 if all is equal, 1 if something differs, 2 if the configuration is refused.",
        example="mslm verify --preset llama3-405b parallel.tensor_model_parallel_size=8 "
        "parallel.pipeline_model_parallel_size=16 parallel.context_parallel_size=2",
        notes=OVERRIDES,
    )
    parser.add_argument(
        "--ranks", type=int, default=4, metavar="N", help="most ranks of one run (default: %(default)s)"
    )
    parser.add_argument("--json", type=path_of, metavar="FILE", help="write the report there too, as JSON")
    parser.add_argument("--verbose", action="store_true", help="show every change that was made, and every detail")
    own, rest = parser.parse_known_args(tokens)
    resolved = resolve(rest)
    if found := violations_of(resolved, None, files=False):
        raise ConfigError("\n".join(found))
    if own.json is not None:
        _require_writable(own.json)
    from megatron_slm.verify import verify as room

    report = room.verify(resolved.config, ranks=own.ranks, say=lambda line: print(f"mslm: {line}", file=sys.stderr))
    print(report.render(verbose=own.verbose))
    if own.json is not None:
        own.json.write_text(report.to_json() + "\n", encoding="utf-8")
    return EXIT_OK if report.equal else EXIT_DIFFERS


def _require_writable(file: Path) -> None:
    """Refuse a place for the report before minutes are spent on it.

    Raises:
        ConfigError: it cannot be written to.
    """
    try:
        file.open("a").close()
    except OSError as error:
        raise ConfigError(
            f"--json {file} cannot be written ({error.strerror}). Name a file in a directory of yours."
        ) from error


VERBS: Mapping[str, Verb] = {"verify": Verb("compare a job on n ranks with one rank", verify)}
