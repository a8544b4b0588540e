"""The verb ``mslm diagnose``: what is wrong with a run, by its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_slm.commands.command import EXIT_OK, Verb, parser_of, path_of

EXIT_FOUND = 1


def diagnose(name: str, tokens: Sequence[str]) -> int:
    """``mslm diagnose``: name the pathologies of a run, with evidence, causes and what to do first."""
    parser = parser_of(
        name,
        "RUN [--against RUN] [--json]",
        "Read what a run has recorded and name what is wrong with it: steps and numbers, the likely causes, the "
        "smallest intervention and the page about it. Reads only, needs no GPU, and works while the run goes on. Exit "
        "code 0 if nothing was found, 1 if something was.",
        example="mslm diagnose runs/kjv",
    )
    parser.add_argument("run", type=path_of, metavar="RUN", help="directory of a run")
    parser.add_argument(
        "--against", type=path_of, metavar="RUN", help="compare with this run: the parent, or one that went well"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    own = parser.parse_args(tokens)
    from megatron_slm.diagnose import records, report, rules

    found = rules.diagnose(records.read(own.run, against=own.against))
    print(report.to_json(found) if own.json else report.render(found))
    return EXIT_FOUND if found.findings else EXIT_OK


VERBS: Mapping[str, Verb] = {"diagnose": Verb("name what is wrong with a run, by its records", diagnose)}
