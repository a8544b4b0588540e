"""The verbs on data: prepare, inspect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_slm.commands.command import EXIT_OK, OVERRIDES, Verb, parser_of, resolve
from megatron_slm.errors import ConfigError


def data_prepare(name: str, tokens: Sequence[str]) -> int:
    """``mslm data prepare``: text -> packed shards that training reads."""
    parser = parser_of(
        name,
        "INPUT [INPUT ...] --output DIR [options]",
        "Tokenize text and write a prepared corpus: packed shards, their index and the tokenizer.",
        example="mslm data prepare books.jsonl --output corpus --vocab-size 4096",
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help=".txt or .jsonl file")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="directory to write")
    parser.add_argument("--vocab-size", type=int, help="size of a new tokenizer (default: 4096)")
    parser.add_argument("--tokenizer-model", type=Path, help="sentencepiece model to use instead of training one")
    parser.add_argument("--split", type=float, default=0.05, help="share of the valid split (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="key of the split (default: %(default)s)")
    parser.add_argument("--text-key", default="text", help="JSONL field that holds the text (default: %(default)s)")
    parser.add_argument(
        "--text-unit",
        choices=("paragraph", "file"),
        default="paragraph",
        help="one document of a .txt file (default: %(default)s)",
    )
    parser.add_argument("--licence", help="note kept with the sources")
    own = parser.parse_args(tokens)
    from megatron_slm.data.prepare import prepare

    result = prepare(
        own.inputs,
        own.output,
        vocab_size=own.vocab_size,
        tokenizer_model=own.tokenizer_model,
        split=own.split,
        seed=own.seed,
        text_key=own.text_key,
        text_unit=own.text_unit,
        licence=own.licence,
    )
    print(json.dumps(result, indent=2, default=str))
    return EXIT_OK


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
    if config.data.data_path is None:
        raise ConfigError("data.data_path is not set: name a prepared corpus with --data-path DIR or in CONFIG.")
    from megatron_slm.data.inspect import inspect

    seed = config.train.seed if config.data.data_seed is None else config.data.data_seed
    directory, length = Path(config.data.data_path), config.model.seq_length
    print(inspect(directory, own.split, own.index, seq_length=length, seed=seed, show_ids=own.show_ids))
    return EXIT_OK


VERBS: Mapping[str, Verb] = {
    "data prepare": Verb("turn text into a prepared corpus", data_prepare),
    "data inspect": Verb("show one sample of a prepared corpus", data_inspect),
}
