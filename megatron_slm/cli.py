"""The command ``mslm``: one small function a verb, each of which imports what it needs when it needs it.

To add a verb, write its function and add a line to :data:`VERBS`; a verb may have two words.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slm.errors import ConfigError, UserError

if TYPE_CHECKING:
    from megatron_slm.config.load import Resolved
    from megatron_slm.launch.environment import RankEnvironment

EXIT_OK = 0
EXIT_REFUSED = 2

_OVERRIDES = """\
CONFIG is a YAML file; key=value (model.num_layers=4) and Megatron's flags (--num-layers 4) override it, in any order.
Precedence: defaults < preset < CONFIG < command line. Every key is described in docs/config.md."""


@dataclass(frozen=True)
class Verb:
    """One thing that ``mslm`` can do."""

    summary: str
    run: Callable[[str, Sequence[str]], int]
    """Takes the verb's name and the tokens after it; returns the exit code."""


def train(name: str, tokens: Sequence[str]) -> int:
    """``mslm train``: every rank runs this under a launcher; without one, this process starts the ranks."""
    parser = _parser(
        name,
        "[CONFIG] [key=value | --flag ...] [--fresh]",
        "Train a model. A run whose directory exists is resumed. Under torchrun, srun or mpirun every process is one "
        "rank; otherwise mslm starts the ranks on this machine.",
        example="mslm train --preset tiny --data-path corpus --train-iters 100",
        notes=_OVERRIDES,
    )
    parser.add_argument("--fresh", action="store_true", help="move an existing run of this name aside and start anew")
    own, rest = parser.parse_known_args(tokens)
    from megatron_slm.launch.environment import from_environment

    environment = from_environment(os.environ)
    if environment is None:
        return _start_ranks(_accepted(rest, None), ["train", *tokens], fresh=own.fresh)
    from megatron_slm.launch.rank import run_rank

    def entry(environment: RankEnvironment) -> int:
        return _train_rank(_accepted(rest, environment.world_size), environment, fresh=own.fresh)

    return run_rank(environment, entry)


def check(name: str, tokens: Sequence[str]) -> int:
    """``mslm check``: every refused value and violated rule at once, without torch."""
    parser = _parser(
        name,
        "[CONFIG] [key=value | --flag ...] [--skip-files]",
        "Check a configuration: list every violated rule, or say how the job would be divided. Exit code 2 if any rule "
        "is violated.",
        example="mslm check --preset llama3-8b --tensor-model-parallel-size 8 --skip-files",
        notes=_OVERRIDES,
    )
    parser.add_argument("--skip-files", action="store_true", help="do not look for the corpus and other input files")
    own, rest = parser.parse_known_args(tokens)
    from megatron_slm.config.load import examine

    resolved, problems = examine(*_sources(rest))
    found = _violations(resolved, None, files=not own.skip_files)
    if problems or found:
        counts = []
        if problems:
            counts.append(f"{len(problems)} problem{'s' * (len(problems) > 1)} in keys and values")
        if found:
            left_out = ", with those keys as if they were not given" if problems else ""
            counts.append(f"{len(found)} rule{'s' * (len(found) > 1)} violated{left_out}")
        print("\n".join([*problems, *found, "; ".join(counts)]), file=sys.stderr)
        return EXIT_REFUSED
    print(_summary(resolved))
    return EXIT_OK


def generate(name: str, tokens: Sequence[str]) -> int:
    """``mslm generate``: what a trained model says after a prompt."""
    parser = _parser(
        name,
        "RUN --prompt TEXT [options]",
        "Continue a prompt with the newest checkpoint of a run, on one rank, whatever layout it was trained under.",
        example='mslm generate runs/kjv --prompt "In the beginning"',
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run, or one of its checkpoints")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=50, help="draw from so many tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="of the draws (default: %(default)s)")
    own = parser.parse_args(tokens)
    if own.max_new_tokens < 1 or own.top_k < 1 or not 0 <= own.temperature < math.inf:  # nan is refused too
        raise ConfigError(
            f"--max-new-tokens {own.max_new_tokens} and --top-k {own.top_k} must be at least 1, --temperature "
            f"{own.temperature} at least 0 and finite."
        )
    from megatron_slm.run_generate import generate as pieces

    # The prompt is printed with the first piece: a refusal stands alone.
    unprinted = own.prompt
    for piece in pieces(
        own.run,
        own.prompt,
        max_new_tokens=own.max_new_tokens,
        temperature=own.temperature,
        top_k=own.top_k,
        seed=own.seed,
    ):
        print(unprinted + piece, end="", flush=True)
        unprinted = ""
    print(unprinted)
    return EXIT_OK


def data_prepare(name: str, tokens: Sequence[str]) -> int:
    """``mslm data prepare``: text -> packed shards that training reads."""
    parser = _parser(
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
    parser = _parser(
        name,
        "[CONFIG] [key=value | --flag ...] [--split NAME] [--index N] [--show-ids]",
        "Show one sample of a prepared corpus, cut and ordered as training reads it.",
        example="mslm data inspect --data-path corpus --seq-length 256 --index 0",
        notes=_OVERRIDES,
    )
    parser.add_argument("--split", default="train", help="train or valid (default: %(default)s)")
    parser.add_argument("--index", type=int, default=0, help="sample, in the order of training (default: %(default)s)")
    parser.add_argument("--show-ids", action="store_true", help="print token ids beside the text")
    own, rest = parser.parse_known_args(tokens)
    config = _resolve(rest).config
    if config.data.data_path is None:
        raise ConfigError("data.data_path is not set: name a prepared corpus with --data-path DIR or in CONFIG.")
    from megatron_slm.data.inspect import inspect

    seed = config.train.seed if config.data.data_seed is None else config.data.data_seed
    directory, length = Path(config.data.data_path), config.model.seq_length
    print(inspect(directory, own.split, own.index, seq_length=length, seed=seed, show_ids=own.show_ids))
    return EXIT_OK


VERBS: Mapping[str, Verb] = {
    "train": Verb("train a model, or resume a run", train),
    "check": Verb("list every violated rule of a configuration, without torch", check),
    "generate": Verb("continue a prompt with a trained model", generate),
    "data prepare": Verb("turn text into a prepared corpus", data_prepare),
    "data inspect": Verb("show one sample of a prepared corpus", data_inspect),
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
        print(_help())
        return EXIT_OK if tokens else EXIT_REFUSED
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
    except SystemExit as stop:  # argparse ends so, after --help (0) or an error on the command line (2)
        return stop.code if isinstance(stop.code, int) else EXIT_REFUSED


def _verb(tokens: Sequence[str]) -> str:
    """The verb at the head of ``tokens``."""
    for name in (" ".join(tokens[:2]), tokens[0]):
        if name in VERBS:
            return name
    typed = " ".join(tokens[:2]) if any(known.startswith(f"{tokens[0]} ") for known in VERBS) else tokens[0]
    nearest = difflib.get_close_matches(typed, list(VERBS), n=1)
    way_out = f"did you mean {nearest[0]}?" if nearest else f"the verbs are {', '.join(VERBS)}."
    raise ConfigError(f"{typed} is no verb; {way_out}")


def _resolve(tokens: Sequence[str]) -> Resolved:
    """The configuration that ``[CONFIG] [overrides]`` describes."""
    from megatron_slm.config.load import load

    return load(*_sources(tokens))


def _sources(tokens: Sequence[str]) -> tuple[Path | None, tuple[str, ...]]:
    """``[CONFIG] [overrides]`` -> the file, if one is named, and the overrides."""
    from megatron_slm.config import flags

    typed = flags.read(tokens)
    if len(typed.positionals) > 1:
        raise ConfigError(
            f"One CONFIG is read, but {len(typed.positionals)} were given: {', '.join(typed.positionals)}. Values are "
            "written key=value or --flag value."
        )
    return Path(typed.positionals[0]) if typed.positionals else None, typed.overrides


def _violations(resolved: Resolved, world_size: int | None, *, files: bool) -> list[str]:
    """Every violated rule, and every missing input file."""
    from megatron_slm.config.files import missing_inputs
    from megatron_slm.config.rules import violations

    found = violations(resolved.config, world_size, provenance=resolved.provenance)
    return found + (missing_inputs(resolved.config, provenance=resolved.provenance) if files else [])


def _accepted(tokens: Sequence[str], world_size: int | None) -> Resolved:
    """The configuration, refused if it breaks any rule."""
    resolved = _resolve(tokens)
    if found := _violations(resolved, world_size, files=True):
        raise ConfigError("\n".join(found))
    return resolved


def _start_ranks(resolved: Resolved, command: Sequence[str], *, fresh: bool) -> int:
    """Start the ranks on this machine and wait for them; ``command`` is the verb with its tokens."""
    from megatron_slm.launch.local import run_local
    from megatron_slm.parallel.device import choose_device, preload

    parallel = resolved.config.parallel
    world_size = parallel.world_size or parallel.model_parallel_size

    def preload_run() -> None:
        preload("cpu")
        import megatron_slm.run  # noqa: F401  (once here instead of once in every rank)

    def entry(environment: RankEnvironment) -> int:
        return _train_rank(resolved, environment, fresh=fresh)

    return run_local(
        world_size,
        entry,
        preload=preload_run,
        warm=choose_device(parallel.device) == "cpu",
        command=[sys.executable, "-m", "megatron_slm.cli", *command],
    )


def _train_rank(resolved: Resolved, environment: RankEnvironment, *, fresh: bool) -> int:
    """The work of one rank."""
    from megatron_slm.parallel.device import choose_device, preload

    # Core must fit the device before any of our modules takes a name out of it.
    preload(choose_device(resolved.config.parallel.device))
    from megatron_slm import run

    return run.train(resolved, environment, fresh=fresh)


def _summary(resolved: Resolved) -> str:
    """How an accepted job would be divided."""
    from megatron_slm.model.counts import flops_per_token, parameters
    from megatron_slm.parallel.layout import Layout, split_layers

    config, parallel, train = resolved.config, resolved.config.parallel, resolved.config.train
    layout = Layout.from_config(parallel, parallel.world_size or parallel.model_parallel_size)
    split = split_layers(
        config.model.num_layers,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        embedding_counts=parallel.account_for_embedding_in_pipeline_split,
        loss_counts=parallel.account_for_loss_in_pipeline_split,
    )
    degrees = " x ".join(f"{axis} {size}" for axis, size in layout.sizes.items())
    microbatches = layout.num_microbatches(train.global_batch_size, train.micro_batch_size)
    step = f"{microbatches}, each of {train.micro_batch_size} x {config.model.seq_length} tokens"
    lines = [
        f"ok: {config.name} ({config.stage})",
        f"ranks: {layout.world_size} = {degrees}",
        f"layers per pipeline stage: {', '.join('+'.join(map(str, chunks)) for chunks in split)}",
        f"micro-batches per step and replica: {step}",
    ]
    if config.model.vocab_size is not None:
        count = parameters(config.model, config.model.vocab_size)
        flops = flops_per_token(config.model, config.model.vocab_size)
        lines.append(f"parameters: {count:,}; model FLOPs per token, forward and backward: {flops:.3e}")
    return "\n".join(lines)


def _parser(name: str, arguments: str, description: str, *, example: str, notes: str = "") -> argparse.ArgumentParser:
    """The parser of one verb; what it does not know is a key of the configuration."""
    return argparse.ArgumentParser(
        prog=f"mslm {name}",
        usage=f"mslm {name} {arguments}",
        description=textwrap.fill(description, 118),
        epilog="\n\n".join(filter(None, (notes, f"example:\n  {example}"))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _help() -> str:
    """``mslm --help``."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        "usage: mslm VERB ...   (mslm VERB --help, mslm --version)\n\n"
        f"{verbs}\n\nexample:\n  mslm check --preset tiny --tensor-model-parallel-size 2 --skip-files"
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
