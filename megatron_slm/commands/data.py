"""The verbs on data: prepare, inspect, stats, verify, export."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slm.commands.command import (
    EXIT_OK,
    EXIT_REFUSED,
    OVERRIDES,
    Verb,
    parser_of,
    path_of,
    resolve,
    stopped_by_sigterm,
)
from megatron_slm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from megatron_slm.config.run_config import RunConfig
    from megatron_slm.data.quality.config import QualityConfig


def data_prepare(name: str, tokens: Sequence[str]) -> int:
    """``mslm data prepare``: text -> packed shards that training reads."""
    own = _prepare_parser(name).parse_args(tokens)
    from megatron_slm.data.prepare import prepare

    with stopped_by_sigterm():
        result = prepare(
            own.inputs,
            own.output,
            vocab_size=own.vocab_size,
            tokenizer_model=own.tokenizer_model,
            tokenizer_type=own.tokenizer_type,
            eod_token=own.eod_token,
            split=own.split,
            seed=own.seed,
            text_key=own.text_key,
            text_unit=own.text_unit,
            pattern=own.pattern,
            licence=own.licence,
            quality=_quality(own),
            workers=own.workers,
        )
    print(json.dumps(result, indent=2, default=str))
    return EXIT_OK


def _prepare_parser(name: str) -> argparse.ArgumentParser:
    parser = parser_of(
        name,
        "INPUT [INPUT ...] --output DIR [options]",
        "Tokenize text and write a prepared corpus: packed shards, their index, the tokenizer and a data card. The "
        "same command after a kill goes on where it stopped.",
        example="mslm data prepare books.jsonl --output corpus --vocab-size 4096",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        type=path_of,
        metavar="INPUT",
        help=".jsonl or .txt (also .gz, .zst), .parquet, a directory of sources, or PREFIX of Megatron's .bin and .idx",
    )
    parser.add_argument("--output", required=True, type=path_of, metavar="DIR", help="directory to write")
    cores = len(os.sched_getaffinity(0))
    reading = parser.add_argument_group("reading")
    reading.add_argument(
        "--text-key", default="text", help="JSONL field or Parquet column that holds the text (default: %(default)s)"
    )
    reading.add_argument(
        "--text-unit",
        choices=("paragraph", "file"),
        default="paragraph",
        help="one document of a .txt file (default: %(default)s)",
    )
    reading.add_argument("--pattern", default="**/*.py", help="files read of a directory (default: %(default)s)")
    reading.add_argument("--licence", metavar="TEXT", help="of all inputs (default: their own SPDX line)")
    reading.add_argument("--split", type=float, default=0.05, help="share of the valid split (default: %(default)s)")
    reading.add_argument("--seed", type=int, default=1234, help="key of the split (default: %(default)s)")
    reading.add_argument("--workers", type=int, default=cores, metavar="N", help="processes (default: one a core)")
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument("--vocab-size", type=int, help="size of a new tokenizer (default: 4096)")
    tokenizer.add_argument("--tokenizer-type", choices=("bpe", "unigram"), help="of a new tokenizer (default: bpe)")
    tokenizer.add_argument(
        "--tokenizer-model", type=path_of, help="sentencepiece model or tokenizer.json to use instead of training one"
    )
    tokenizer.add_argument("--eod-token", metavar="TOKEN", help="of --tokenizer-model: what ends a document")
    _add_quality(parser)
    return parser


def _add_quality(parser: argparse.ArgumentParser) -> None:
    quality = parser.add_argument_group("quality (default: every document is kept as it is)")
    quality.add_argument("--dedup", choices=("exact", "near"), help="keep the first of equal, or of similar, documents")
    quality.add_argument("--near-threshold", type=float, help="Jaccard similarity of --dedup near (default: 0.8)")
    quality.add_argument("--min-chars", type=int, default=0, metavar="N", help="drop shorter documents")
    quality.add_argument("--max-chars", type=int, metavar="N", help="drop longer documents")
    quality.add_argument("--language", nargs="+", default=(), metavar="CODE", help="keep these languages alone: en de")
    quality.add_argument(
        "--scrub-pii", action="store_true", help="replace e-mail addresses, card numbers and the like by tags"
    )
    quality.add_argument(
        "--decontaminate",
        nargs="+",
        type=path_of,
        default=(),
        metavar="FILE",
        help="drop what overlaps with eval files",
    )
    quality.add_argument(
        "--decontaminate-key", metavar="KEY", help="field or column that holds the text in eval files (default: text)"
    )
    quality.add_argument("--ngram", type=int, metavar="N", help="words of an overlap that counts (default: 13)")


def _quality(own: argparse.Namespace) -> QualityConfig:
    """The filters that were asked for."""
    if own.near_threshold is not None and own.dedup != "near":
        raise ConfigError(f"--near-threshold {own.near_threshold} is of --dedup near: add that, or drop it.")
    for option, value in (("--ngram", own.ngram), ("--decontaminate-key", own.decontaminate_key)):
        if value is not None and not own.decontaminate:
            raise ConfigError(f"{option} {value} is of --decontaminate FILE: add that, or drop it.")
    from megatron_slm.data.quality.config import QualityConfig

    near_threshold = 0.8 if own.near_threshold is None else own.near_threshold
    return QualityConfig(
        exact_duplicates=own.dedup is not None,
        near_duplicates=near_threshold if own.dedup == "near" else None,
        min_characters=own.min_chars,
        max_characters=own.max_chars,
        languages=tuple(own.language),
        scrub_pii=own.scrub_pii,
        leakage_against=tuple(map(str, own.decontaminate)),
        leakage_ngram=13 if own.ngram is None else own.ngram,
        leakage_text_key="text" if own.decontaminate_key is None else own.decontaminate_key,
    )


def data_inspect(name: str, tokens: Sequence[str]) -> int:
    """``mslm data inspect``: one training sample as the model would see it."""
    parser = parser_of(
        name,
        "[CONFIG] [key=value | --flag ...] [--split NAME] [--index N] [--show-ids]",
        "Show one sample of a prepared corpus, cut and ordered as training reads it.",
        example="mslm data inspect --data-path corpus --seq-length 256 --index 0",
        notes=OVERRIDES,
    )
    parser.add_argument("--split", default="train", help="train or valid (default: %(default)s)")
    parser.add_argument("--index", type=int, default=0, help="sample, in the order of training (default: %(default)s)")
    parser.add_argument("--show-ids", action="store_true", help="print token ids beside the text")
    own, rest = parser.parse_known_args(tokens)
    config = resolve(rest).config
    if config.data.sources or config.data.replay_run is not None:
        print(_inspect_mixture(config, own.split, own.index, show_ids=own.show_ids))
        return EXIT_OK
    if config.data.data_path is None:
        raise ConfigError("data.data_path is not set: name a prepared corpus with --data-path DIR or in CONFIG.")
    from megatron_slm.data.inspect import inspect

    seed = config.train.seed if config.data.data_seed is None else config.data.data_seed
    directory, length = Path(config.data.data_path), config.model.seq_length
    print(inspect(directory, own.split, own.index, seq_length=length, seed=seed, show_ids=own.show_ids))
    return EXIT_OK


def _inspect_mixture(config: RunConfig, split: str, position: int, *, show_ids: bool) -> str:
    """A sample of a run over several sources, under the shares that ``config`` says and the run has decided."""
    if split != "train":
        raise ConfigError(f"--split {split}: of a mixture the train split is shown; name one corpus with --data-path.")
    from megatron_slm.config.rules import require
    from megatron_slm.data.inspect import inspect_mixture
    from megatron_slm.run_data import open_data, saved_cursor

    require(config)
    # Held-out splits are not needed to show what is trained on.
    data = open_data(replace(config, train=replace(config.train, eval_iters=0)), verify=True)
    order, reached, run = data.order, 0, Path(config.log.runs_dir) / str(config.name)
    try:
        if (cursor := saved_cursor(config, data)) is not None:
            order, reached = cursor.order, cursor.consumed_samples
    except CheckpointError as error:
        print(f"warning: shown as configured, not as {run} has read it: {error}", file=sys.stderr)
    if config.data.loss_aware_strength and position >= reached:
        print(
            f"warning: sample {position} is not before the {reached} that the newest checkpoint of {run} has read; "
            "held-out losses may change the shares until then (data.loss_aware_strength)",
            file=sys.stderr,
        )
    return inspect_mixture(data.train, order, data.tokenizer, position, show_ids=show_ids)


def data_stats(name: str, tokens: Sequence[str]) -> int:
    """``mslm data stats``: how long the documents are, which tokens are common."""
    parser = parser_of(
        name,
        "DIR [--split NAME]",
        "Describe one split of a prepared corpus: documents, tokens, lengths, vocabulary.",
        example="mslm data stats corpus",
    )
    parser.add_argument("data_path", type=path_of, metavar="DIR", help="prepared corpus")
    parser.add_argument("--split", choices=("train", "valid"), default="train", help="(default: %(default)s)")
    own = parser.parse_args(tokens)
    from megatron_slm.data.stats import describe

    print(describe(own.data_path, own.split))
    return EXIT_OK


def data_verify(name: str, tokens: Sequence[str]) -> int:
    """``mslm data verify``: every file of a corpus read and hashed, every problem listed."""
    parser = parser_of(
        name,
        "DIR",
        "Read and hash every file of a prepared corpus and list what is not as it was prepared. Exit code 2 if "
        "anything is.",
        example="mslm data verify corpus",
    )
    parser.add_argument("data_path", type=path_of, metavar="DIR", help="prepared corpus")
    own = parser.parse_args(tokens)
    from megatron_slm.data.verify import verify

    found = verify(own.data_path)
    if found.problems:
        count = f"{len(found.problems)} problem{'s' * (len(found.problems) > 1)} in {own.data_path}"
        print("\n".join([*found.problems, count]), file=sys.stderr)
        return EXIT_REFUSED
    print(f"ok: {own.data_path}: {found}")
    return EXIT_OK


def data_export(name: str, tokens: Sequence[str]) -> int:
    """``mslm data export``: one split as Megatron's own token files."""
    parser = parser_of(
        name,
        "DIR --output PREFIX [--split NAME]",
        "Write one split of a prepared corpus as Megatron's PREFIX.bin and PREFIX.idx.",
        example="mslm data export corpus --split train --output corpus-train",
    )
    parser.add_argument("data_path", type=path_of, metavar="DIR", help="prepared corpus")
    parser.add_argument("--output", required=True, type=path_of, metavar="PREFIX", help="names of the files, less .bin")
    parser.add_argument("--split", choices=("train", "valid"), default="train", help="(default: %(default)s)")
    own = parser.parse_args(tokens)
    from megatron_slm.data.corpus import Corpus
    from megatron_slm.data.indexed import export

    corpus = Corpus.open(own.data_path / own.split, verify="hash")
    export(corpus, own.output)
    print(
        f"{own.output}.bin and .idx: {corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens; each document "
        f"ends with token {corpus.eod_id}"
    )
    return EXIT_OK


VERBS: Mapping[str, Verb] = {
    "data prepare": Verb("turn text into a prepared corpus", data_prepare),
    "data inspect": Verb("show one sample of a prepared corpus", data_inspect),
    "data stats": Verb("describe a prepared corpus", data_stats),
    "data verify": Verb("hash every file of a prepared corpus", data_verify),
    "data export": Verb("write a prepared corpus as Megatron's .bin and .idx", data_export),
}
