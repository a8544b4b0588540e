"""The verbs on examples, what is trained on after pretraining: data examples, data show."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence

from megatron_slm.commands.command import EXIT_OK, Verb, parser_of, path_of, stopped_by_sigterm
from megatron_slm.errors import ConfigError


def data_examples(name: str, tokens: Sequence[str]) -> int:
    """``mslm data examples``: rows of JSON -> documents with per-token weights that stages after pretraining read."""
    own = _examples_parser(name).parse_args(tokens)
    if own.near_threshold is not None and own.dedup != "near":
        raise ConfigError(f"--near-threshold {own.near_threshold} is of --dedup near: add that, or drop it.")
    from megatron_slm.data.examples.compiling import compile_examples
    from megatron_slm.data.examples.request import Options

    options = Options(
        kind=own.kind,
        seq_length=own.seq_length,
        valid_share=own.valid_share,
        seed=own.seed,
        on_bad_row=own.on_bad_row,
        too_long=own.too_long,
        rationale_weight=own.rationale_weight,
        score_key=own.score_key,
        duplicates=own.dedup,
        near_threshold=0.8 if own.near_threshold is None else own.near_threshold,
        leak_share=own.leak_share,
    )
    with stopped_by_sigterm():
        result = compile_examples(
            own.inputs,
            own.output,
            options,
            tokenizer_model=own.tokenizer_model,
            template=own.template,
            eod_token=own.eod_token,
            check_against=own.check_against,
            workers=own.workers,
        )
    print(json.dumps(result, indent=2, ensure_ascii=False))
    return EXIT_OK


def _examples_parser(name: str) -> argparse.ArgumentParser:
    parser = parser_of(
        name,
        "INPUT [INPUT ...] --output DIR --kind KIND --tokenizer-model PATH --seq-length N [options]",
        "Render rows with a chat template, tokenise them, mark what the assistant made, and write splits that stages "
        "after pretraining read. The same command after a kill goes on where it stopped.",
        example="mslm data examples chats.jsonl --output chats --kind chat --tokenizer-model corpus/tokenizer "
        "--template plain --seq-length 256",
    )
    parser.add_argument(
        "inputs", nargs="+", type=path_of, metavar="INPUT", help=".jsonl (also .gz, .zst) or .parquet, a row an example"
    )
    parser.add_argument("--output", required=True, type=path_of, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--kind",
        required=True,
        choices=("chat", "preference", "prompt"),
        help="messages, or prompt and completion; prompt, chosen and rejected; prompt and anything else",
    )
    parser.add_argument("--tokenizer-model", required=True, type=path_of, metavar="PATH", help="file, or its directory")
    parser.add_argument("--seq-length", required=True, type=int, metavar="N", help="tokens that an example may have")
    cores = len(os.sched_getaffinity(0))
    rendering = parser.add_argument_group("rendering")
    rendering.add_argument(
        "--template", metavar="NAME", help="chatml, plain, raw, or a file of Jinja2 (default: the tokenizer's own)"
    )
    rendering.add_argument("--eod-token", metavar="TOKEN", help="of the tokenizer: what ends a document")
    rendering.add_argument(
        "--rationale-weight", type=float, default=1.0, metavar="W", help="of the tokens of rationales (default: 1)"
    )
    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--on-bad-row",
        choices=("stop", "skip"),
        default="stop",
        help="refuse the input, or leave the row out and count",
    )
    rows.add_argument(
        "--too-long", choices=("leave-out", "truncate"), default="leave-out", help="of a chat longer than --seq-length"
    )
    rows.add_argument("--valid-share", type=float, default=0.05, help="of the prompts (default: %(default)s)")
    rows.add_argument("--seed", type=int, default=1234, help="key of the split (default: %(default)s)")
    rows.add_argument("--score-key", metavar="FIELD", help="holds a number to sort by, as a curriculum does")
    rows.add_argument("--workers", type=int, default=cores, metavar="N", help="processes (default: one a core)")
    quality = parser.add_argument_group("quality")
    quality.add_argument("--dedup", choices=("exact", "near"), help="keep the first of equal, or of similar, rows")
    quality.add_argument("--near-threshold", type=float, help="Jaccard similarity of --dedup near (default: 0.8)")
    quality.add_argument(
        "--check-against", nargs="+", type=path_of, default=(), metavar="EVAL", help="leave out what eval rows ask"
    )
    quality.add_argument(
        "--leak-share",
        type=float,
        default=0.8,
        help="of its words in 13-grams of eval rows (default: 0.8)",
    )
    return parser


def data_show(name: str, tokens: Sequence[str]) -> int:
    """``mslm data show``: what of compiled examples is trained."""
    parser = parser_of(
        name,
        "DIR [--split NAME] [--first N] [--seq-length N]",
        "Describe compiled examples: trained tokens by role, packing, what was left out and why, and the first ones "
        "with their trained tokens coloured (in [[ ]] where the output is no terminal).",
        example="mslm data show chats --first 2",
    )
    parser.add_argument("data_path", type=path_of, metavar="DIR", help="what `mslm data examples` wrote")
    parser.add_argument("--split", choices=("train", "valid"), default="train", help="(default: %(default)s)")
    parser.add_argument("--first", type=int, default=3, metavar="N", help="examples to print (default: %(default)s)")
    parser.add_argument("--seq-length", type=int, metavar="N", help="of the packing (default: that of the compilation)")
    own = parser.parse_args(tokens)
    from megatron_slm.data.examples.report import describe

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(describe(own.data_path, own.split, first=own.first, seq_length=own.seq_length, colour=colour))
    return EXIT_OK


VERBS: Mapping[str, Verb] = {
    "data examples": Verb("turn chats, preferences or prompts into examples", data_examples),
    "data show": Verb("show what of compiled examples is trained", data_show),
}
