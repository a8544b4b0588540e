"""The verb ``data teacher``: what a trained model finds likeliest in examples, stored for a distillation."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_slm.commands.command import EXIT_OK, Verb, parser_of, path_of, stopped_by_sigterm
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
    from megatron_slm import run_generate
    from megatron_slm.launch.environment import from_environment
    from megatron_slm.run_teacher import Wanted

    wanted = Wanted(own.run, own.examples, own.output, own.top_k, own.temperature, own.batch_size)
    if own.one_rank or (ranks := run_generate.ranks_of(own.run)) == 1:
        with stopped_by_sigterm():
            return _store(wanted, None)

    def entry(environment: RankEnvironment) -> int:
        return _store(wanted, environment)

    if (environment := from_environment(os.environ)) is not None:
        from megatron_slm.launch.rank import run_rank

        return run_rank(environment, entry)
    from megatron_slm.launch.local import run_local
    from megatron_slm.parallel.device import choose_device, preload

    def preload_teacher() -> None:
        preload("cpu")
        for module in ("torch._dynamo", "megatron_slm.rollout.generate", "megatron_slm.train.checkpoint"):
            importlib.import_module(module)  # once here instead of once in every rank

    return run_local(
        ranks,
        entry,
        preload=preload_teacher,
        warm=lambda: choose_device("auto") == "cpu",
        command=[sys.executable, "-m", "megatron_slm.cli", "data", "teacher", *tokens],
    )


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
