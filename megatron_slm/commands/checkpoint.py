"""The verbs on checkpoints: list, verify, inspect, average, merge-lora, reshard, hash."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_slm.commands.command import EXIT_OK, EXIT_REFUSED, Verb, parser_of, path_of, sources
from megatron_slm.errors import CheckpointError, ConfigError

EXIT_DIFFERENT = 1
"""Of a comparison, as of ``cmp``."""
SHOWN = 5
"""Tensors that a comparison names."""


def checkpoint_list(name: str, tokens: Sequence[str]) -> int:
    """``mslm checkpoint list``: the checkpoints of a run."""
    parser = parser_of(
        name,
        "RUN",
        "List the checkpoints of a run: step, size, age, whether every file is there, and why each is kept.",
        example="mslm checkpoint list runs/kjv",
    )
    parser.add_argument("run", type=path_of, metavar="RUN", help="directory of a run, or its checkpoints directory")
    own = parser.parse_args(tokens)
    from megatron_slm.train.checkpoint_report import listing

    print(listing(own.run))
    return EXIT_OK


def checkpoint_verify(name: str, tokens: Sequence[str]) -> int:
    """``mslm checkpoint verify``: read every byte and compare it with what was saved."""
    parser = parser_of(
        name,
        "RUN | ITER [ITER ...]",
        "Compare checkpoints with their manifests, every byte. Exit code 2 if any is damaged.",
        example="mslm checkpoint verify runs/kjv",
    )
    parser.add_argument("paths", nargs="+", type=path_of, metavar="PATH", help="a run, or iter_NNNNNNN directories")
    own = parser.parse_args(tokens)
    from megatron_slm.train.checkpoint_report import verified

    whole = True
    for line, sound in verified(own.paths):
        print(line, flush=True)
        whole = whole and sound
    return EXIT_OK if whole else EXIT_REFUSED


def checkpoint_inspect(name: str, tokens: Sequence[str]) -> int:
    """``mslm checkpoint inspect``: what a checkpoint holds."""
    parser = parser_of(
        name,
        "ITER [--tensor NAME ...]",
        "Show what a checkpoint holds: its state, and every tensor with its shape, dtype and bytes.",
        example="mslm checkpoint inspect runs/kjv --tensor decoder.final_layernorm.weight",
    )
    parser.add_argument("path", type=path_of, metavar="ITER", help="a checkpoint, or a run (its newest)")
    parser.add_argument("--tensor", action="append", default=[], metavar="NAME", help="statistics of this tensor")
    own = parser.parse_args(tokens)
    from megatron_slm.train import recovery
    from megatron_slm.train.checkpoint_report import contents

    found = recovery.find(own.path)
    if found.warning is not None:
        print(f"warning: {found.warning}", file=sys.stderr)
    path = found.path
    if not own.tensor:
        print(contents(path))
        return EXIT_OK
    from megatron_slm.parallel.device import preload

    preload("cpu")
    from megatron_slm.train.tensor_statistics import statistics

    for tensor in own.tensor:
        print(statistics(path, tensor))
    return EXIT_OK


def checkpoint_average(name: str, tokens: Sequence[str]) -> int:
    """``mslm checkpoint average``: one model whose weights are the mean of several."""
    parser = parser_of(
        name,
        "RUN --last K --output DIR   or   ITER ITER [ITER ...] --output DIR",
        "Average the weights of checkpoints of one run. The result is a checkpoint without an optimizer, for mslm "
        "generate and for checkpoint.pretrained_checkpoint.",
        example="mslm checkpoint average runs/kjv --last 3 --output kjv-averaged",
    )
    parser.add_argument("paths", nargs="+", type=path_of, metavar="PATH", help="a run, or iter_NNNNNNN directories")
    parser.add_argument("--last", type=int, metavar="K", help="the newest K checkpoints of a run")
    parser.add_argument(
        "--output", required=True, type=path_of, metavar="DIR", help="directory to write; must not exist"
    )
    own = parser.parse_args(tokens)
    paths = _to_average(own.paths, own.last)
    from megatron_slm.parallel.device import preload

    preload("cpu")
    from megatron_slm.train.average import average

    print(f"the mean of {', '.join(path.name for path in paths)} is in {average(paths, own.output)}")
    return EXIT_OK


def checkpoint_merge_lora(name: str, tokens: Sequence[str]) -> int:
    """``mslm checkpoint merge-lora``: put adapters into the weights."""
    parser = parser_of(
        name,
        "CHECKPOINT --output DIR",
        "Put the adapters of a checkpoint (LoRA) into its weights. The result is a checkpoint without adapters and "
        "without an optimizer, for mslm generate, mslm convert hf-export and checkpoint.pretrained_checkpoint.",
        example="mslm checkpoint merge-lora runs/kjv-lora --output kjv-merged",
    )
    parser.add_argument("checkpoint", type=path_of, metavar="CHECKPOINT", help="a checkpoint, or a run (its newest)")
    parser.add_argument(
        "--output", required=True, type=path_of, metavar="DIR", help="directory to write; must not exist"
    )
    own = parser.parse_args(tokens)
    from megatron_slm.parallel.device import preload

    preload("cpu")
    from megatron_slm.convert.merge_lora import merge_lora

    source, count = merge_lora(own.checkpoint, own.output)
    print(f"{own.output} is {source} with the adapters in {count} of its matrices")
    return EXIT_OK


def checkpoint_reshard(name: str, tokens: Sequence[str]) -> int:
    """``mslm checkpoint reshard``: the same tensors, cut for the ranks of another layout."""
    parser = parser_of(
        name,
        "SOURCE --output RUN [key=value | --flag ...]",
        "Cut a checkpoint anew for another layout, without ranks and with one piece in memory at a time. RUN is a new "
        "run's directory that mslm train resumes; the global hash proves that its tensors are the source's. Any layout "
        "reads any checkpoint without this: it saves the ranks from reading parts of many files.",
        example="mslm checkpoint reshard runs/kjv --output runs/kjv-tp2 --tensor-model-parallel-size 2",
        notes="SOURCE is a run (its newest checkpoint) or an iter_NNNNNNN directory. Degrees that are not given stay "
        "as they are;\n--world-size, if it is not given, is one model replica. Random states belong to the ranks that "
        "were: the resume\ndraws new ones from seed and step, as under any other layout.",
    )
    parser.add_argument("--output", required=True, type=path_of, metavar="RUN", help="directory to make, not there yet")
    own, rest = parser.parse_known_args(tokens)
    source, overrides = sources(rest)
    if source is None:
        raise ConfigError("No SOURCE was given: name a run's directory, or one of its iter_NNNNNNN directories.")
    from megatron_slm.parallel.device import preload

    preload("cpu")
    from megatron_slm.train.reshard import in_words, reshard

    done = reshard(source, own.output, overrides)
    if done.warning is not None:
        print(f"warning: {done.warning}", file=sys.stderr)
    print(
        f"{done.path}: {done.num_bytes:,} bytes of tensors in {done.num_files} files\n"
        f"from         {in_words(done.before)}\n"
        f"to           {in_words(done.after)}\n"
        f"global hash  {done.global_hash}, of the source and of what was written\n"
        "random states are left out: a resume draws new ones from seed and step"
    )
    return EXIT_OK


def checkpoint_hash(name: str, tokens: Sequence[str]) -> int:
    """``mslm checkpoint hash``: what a checkpoint's tensors are, however they are cut."""
    parser = parser_of(
        name,
        "PATH [OTHER] [--weights]",
        "Print the global hash of a checkpoint's tensors, which does not depend on the layout it was saved under; or "
        "compare two. Exit code 1 if they differ, with the first tensors that do.",
        example="mslm checkpoint hash runs/kjv runs/kjv-tp2",
    )
    parser.add_argument("paths", nargs="+", type=path_of, metavar="PATH", help="runs (their newest), or checkpoints")
    parser.add_argument("--weights", action="store_true", help="the model's weights alone, without optimizer and parts")
    own = parser.parse_args(tokens)
    if len(own.paths) > 2:
        raise ConfigError(f"One checkpoint is hashed or two are compared; {len(own.paths)} were given.")
    from megatron_slm.train import recovery
    from megatron_slm.train.checkpoint_report import hashes
    from megatron_slm.train.global_hash import differing

    found = []
    for path in own.paths:
        chosen = recovery.find(path)
        if chosen.warning is not None:
            print(f"warning: {chosen.warning}", file=sys.stderr)
        combined, tensors = hashes(chosen.path, weights_only=own.weights)
        print(f"{combined}  {chosen.path}", flush=True)
        found.append(tensors)
    different = differing(*found) if len(found) == 2 else []
    if different:
        more = len(different) - SHOWN
        lines = [*different[:SHOWN], *([f"and {more} more"] if more > 0 else [])]
        print("\n".join([f"{len(different)} of {len({*found[0], *found[1]})} tensors differ:", *lines]))
    return EXIT_DIFFERENT if different else EXIT_OK


def _to_average(paths: list[Path], last: int | None) -> list[Path]:
    """The checkpoints that are meant, oldest first."""
    if last is None:
        if len(paths) < 2:
            raise ConfigError("Averaging takes a run and --last K, or two checkpoints or more; one path was given.")
        return paths
    if len(paths) != 1 or last < 1:
        raise ConfigError(f"--last {last} takes the newest checkpoints of one run and must be at least 1.")
    from megatron_slm.train.checkpoint_report import checkpoints_of

    there = [*checkpoints_of(paths[0]).values()]
    if len(there) < last:
        raise CheckpointError(f"{paths[0]} has {len(there)} checkpoints, fewer than --last {last}; give a smaller one")
    return there[-last:]


VERBS: Mapping[str, Verb] = {
    "checkpoint list": Verb("list the checkpoints of a run", checkpoint_list),
    "checkpoint verify": Verb("compare checkpoints with what was saved", checkpoint_verify),
    "checkpoint inspect": Verb("show what a checkpoint holds", checkpoint_inspect),
    "checkpoint average": Verb("average the weights of checkpoints", checkpoint_average),
    "checkpoint merge-lora": Verb("put adapters (LoRA) into the weights", checkpoint_merge_lora),
    "checkpoint reshard": Verb("cut a checkpoint anew for another layout", checkpoint_reshard),
    "checkpoint hash": Verb("hash tensors whatever the layout; compare two checkpoints", checkpoint_hash),
}
