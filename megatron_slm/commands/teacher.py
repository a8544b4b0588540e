"""The verb ``data teacher``: what a trained model finds likeliest in examples, stored for a distillation."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_slm.commands.command import EXIT_OK, Verb, parser_of, path_of, stopped_by_sigterm
from megatron_slm.commands.model_ranks import on_ranks_of
from megatron_slm.errors import ConfigError

if TYPE_CHECKING:
    from megatron_slm.launch.environment import RankEnvironment
    from megatron_slm.run_teacher import Wanted

NOTES = """\
A distillation on the same examples then needs no second model: set distill.distill_teacher to DIR and
distill.teacher_topk to N or fewer. At each label that counts the N likeliest tokens are stored with their
log-probabilities in the whole vocabulary, and what all other tokens have. The model is divided as its configuration
says; --one-rank loads it on one."""


def data_teacher(name: str, tokens: Sequence[str]) -> int:
    """``mslm data teacher``: store what a model says of examples."""
    own = _parser(name).parse_args(tokens)
    if own.top_k < 1 or own.batch_size < 1:
        raise ConfigError(f"--top-k {own.top_k} and --batch-size {own.batch_size} must be at least 1.")
    if not 0 < own.temperature < float("inf"):  # nan is refused too
        raise ConfigError(f"--temperature {own.temperature} must be above 0 and finite.")
    from megatron_slm.run_teacher import Wanted

    wanted = Wanted(own.run, own.examples, own.output, own.top_k, own.temperature, own.batch_size)

    def work(environment: RankEnvironment | None) -> int:
        if environment is not None:
            return _store(wanted, environment)
        with stopped_by_sigterm():
            return _store(wanted, None)

    return on_ranks_of(own.run, work, ["data", "teacher", *tokens], one_rank=own.one_rank)


def _parser(name: str) -> argparse.ArgumentParser:
    parser = parser_of(
        name,
        "RUN EXAMPLES --output DIR [--top-k N] [--temperature T] [options]",
        "Let the newest checkpoint of a run, or one of its checkpoints, read compiled chats, and store what it finds "
        "likeliest at every label that is trained.",
        example="mslm data teacher runs/sort-grpo data/sorting/few --output data/sorting/teacher --top-k 16",
        notes=NOTES,
    )
    parser.add_argument("run", type=path_of, metavar="RUN", help="directory of a run, or one of its checkpoints")
    parser.add_argument("examples", type=path_of, metavar="EXAMPLES", help="what `mslm data examples` wrote")
    parser.add_argument("--output", required=True, type=path_of, metavar="DIR", help="directory to write")
    parser.add_argument("--top-k", type=int, default=64, metavar="N", help="tokens a label (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="divides the logits (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="rows at a time (default: %(default)s)")
    parser.add_argument("--one-rank", action="store_true", help="on one rank, whatever the run's layout")
    return parser


def _store(wanted: Wanted, environment: RankEnvironment | None) -> int:
    """The work of one rank; the first one prints."""
    from megatron_slm.run_teacher import store_teacher

    result = store_teacher(wanted, environment=environment)
    if result is not None:
        print(json.dumps(result, indent=2), flush=True)
    return EXIT_OK


VERBS: Mapping[str, Verb] = {
    "data teacher": Verb("store what a trained model says of examples, for a distillation", data_teacher),
}
