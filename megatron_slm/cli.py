"""The command ``mslm``: finds the verb that was typed and runs it.

To add a verb, write its function in ``commands/`` and a line in that file's ``VERBS``; a verb may have two words. Each
imports what it needs when it needs it.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

from megatron_slm.commands import (
    checkpoint,
    convert,
    data,
    diagnose,
    doctor,
    eval as evaluation,
    examples,
    generate,
    memory,
    plan,
    profile,
    replay,
    restart,
    slurm,
    teacher,
    training,
    verify,
)
from megatron_slm.commands.command import EXIT_OK, EXIT_REFUSED, Verb
from megatron_slm.errors import ConfigError, UserError

VERBS: Mapping[str, Verb] = {
    **training.VERBS,
    **generate.VERBS,
    **data.VERBS,
    **examples.VERBS,
    **teacher.VERBS,
    **checkpoint.VERBS,
    **convert.VERBS,
    **verify.VERBS,
    **memory.VERBS,
    **plan.VERBS,
    **profile.VERBS,
    **replay.VERBS,
    **doctor.VERBS,
    **restart.VERBS,
    **slurm.VERBS,
    **diagnose.VERBS,
    **evaluation.VERBS,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the tokens after ``mslm``; default ``sys.argv[1:]``.

    Returns:
        The exit code: 0 done, 2 the input was refused, 75 stopped after a clean save, 1 anything else.
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    if not tokens or tokens[0] in ("-h", "--help"):
        print(_help(VERBS))
        return EXIT_OK if tokens else EXIT_REFUSED
    # `plan` is a verb of its own beside `plan calibrate`; its help is the verb's.
    if tokens[0] not in VERBS and (group := _group(tokens[0])) and tokens[1:] in (["-h"], ["--help"]):
        print(_help(group, tokens[0]))
        return EXIT_OK
    if tokens[0] == "--version":
        print(_version())
        return EXIT_OK
    try:
        name = _verb(tokens)
        code = VERBS[name].run(name, tokens[len(name.split()) :])
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"mslm: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("mslm: interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as a shell says it
    except SystemExit as stop:  # argparse ends so, after --help (0) or an error on the command line (2)
        return stop.code if isinstance(stop.code, int) else EXIT_REFUSED


def _verb(tokens: Sequence[str]) -> str:
    """The verb at the head of ``tokens``."""
    for name in (" ".join(tokens[:2]), tokens[0]):
        if name in VERBS:
            return name
    typed = " ".join(tokens[:2]) if _group(tokens[0]) else tokens[0]
    nearest = difflib.get_close_matches(typed, list(VERBS), n=1)
    way_out = f"did you mean {nearest[0]}?" if nearest else f"the verbs are {', '.join(VERBS)}."
    raise ConfigError(f"{typed} is no verb; {way_out}")


def _group(word: str) -> Mapping[str, Verb]:
    """The verbs of two words that begin with ``word``."""
    return {name: verb for name, verb in VERBS.items() if name.startswith(f"{word} ")}


def _help(verbs: Mapping[str, Verb], group: str = "") -> str:
    """``mslm --help``, or ``mslm GROUP --help``."""
    width = max(map(len, verbs))
    lines = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in verbs.items())
    if group:
        return f"usage: mslm {group} VERB ...   (mslm {group} VERB --help)\n\n{lines}"
    return (
        "usage: mslm VERB ...   (mslm VERB --help, mslm --version)\n\n"
        f"{lines}\n\nexample:\n  mslm check --preset tiny --tensor-model-parallel-size 2 --skip-files"
    )


def _version() -> str:
    """Version of this program and of what its numbers depend on."""
    found = []
    for distribution in ("megatron-slm", "megatron-core", "torch"):
        try:
            found.append(f"{distribution} {metadata.version(distribution)}")
        except metadata.PackageNotFoundError:
            found.append(f"{distribution} (not installed)")
    return ", ".join(found)


if __name__ == "__main__":
    sys.exit(main())
