"""The verbs on recordings: what was recorded, and where two runs part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_slm.commands.command import EXIT_OK, Verb, parser_of, path_of
from megatron_slm.errors import ConfigError

EXIT_DIFFERENT = 1


def replay_show(name: str, tokens: Sequence[str]) -> int:
    """``mslm replay show``: what a run has recorded of itself."""
    parser = parser_of(
        name,
        "RUN [--step N] [--rank R]",
        "Show what a run has recorded: its steps, or every fingerprint of one step on one rank.",
        example="mslm replay show runs/kjv --step 20 --rank 3",
    )
    parser.add_argument("run", type=path_of, metavar="RUN", help="directory of a run that was recorded")
    parser.add_argument("--step", type=int, metavar="N", help="every record of this step")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="of this rank (default 0)")
    own = parser.parse_args(tokens)
    from megatron_slm.replay import report
    from megatron_slm.replay.capsule import Capsule

    capsule = Capsule.of(own.run)
    if own.step is None:
        print(report.capsule_text(capsule))
        return EXIT_OK
    if own.rank not in capsule.ranks:
        raise ConfigError(f"--rank {own.rank}: {capsule.folder} has ranks {capsule.ranks[0]} to {capsule.ranks[-1]}.")
    frames = [frame for frame in capsule.frames(own.rank) if frame.step == own.step]
    if not frames:
        raise ConfigError(f"--step {own.step} was not recorded; mslm replay show {own.run} lists the steps.")
    names = capsule.names(own.rank)
    for frame in frames:
        print(report.frame_text(frame, names))
    return EXIT_OK


def replay_diff(name: str, tokens: Sequence[str]) -> int:
    """``mslm replay diff``: the first place where two runs part, and why."""
    parser = parser_of(
        name,
        "A B [--json]",
        "Name the first step, rank, phase, module and tensor in which two recorded runs of one layout differ, whether "
        "its inputs were equal, and what kind of cause that has. Exit code 0 if every step that both have recorded is "
        "equal, 1 if not.",
        example="mslm replay diff runs/first runs/second",
    )
    parser.add_argument("runs", nargs=2, type=path_of, metavar="RUN", help="directories of runs that were recorded")
    parser.add_argument("--json", action="store_true", help="print JSON lines; nothing where the runs are equal")
    own = parser.parse_args(tokens)
    from megatron_slm.replay import report
    from megatron_slm.replay.capsule import Capsule
    from megatron_slm.replay.cause import cause
    from megatron_slm.replay.diff import first_divergence

    first, second = map(Capsule.of, own.runs)
    found = first_divergence(first, second)
    if found is None:
        if not own.json:
            print("equal: every recorded step that both runs have, on every rank")
        return EXIT_OK
    why = cause(first, second, found)
    print(report.divergence_json(found, why) if own.json else report.divergence_text(found, why))
    return EXIT_DIFFERENT


VERBS: Mapping[str, Verb] = {
    "replay show": Verb("show what a run has recorded of itself", replay_show),
    "replay diff": Verb("name the first place where two recorded runs part, and why", replay_diff),
}
