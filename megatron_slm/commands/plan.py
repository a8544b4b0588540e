"""The verbs ``mslm plan`` and ``mslm plan calibrate``: the fastest layout of a job, and how fast this machine is."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slm.commands.command import EXIT_OK, OVERRIDES, Verb, parser_of, path_of, resolve
from megatron_slm.errors import ConfigError

if TYPE_CHECKING:
    from megatron_slm.config.load import Resolved
    from megatron_slm.launch.environment import RankEnvironment
    from megatron_slm.plan.cluster import Cluster
    from megatron_slm.plan.predict import Question
    from megatron_slm.plan.search import Candidate, Found

EXIT_NOTHING_FITS = 1
WIDE = 4.0
"""Ratio of a rate's 90th to its 10th percentile above which it is not to be relied on."""
TOKENS_OF_A_STEP = 4 * 2**20
"""Where no global batch is given: what large models are trained with (16 Mi in the last part of Llama 3's)."""


def plan(name: str, tokens: Sequence[str]) -> int:
    """``mslm plan``: search layouts for a model on a cluster."""
    parser = parser_of(
        name,
        "--model M --cluster C [--gpus N] [key=value | --flag ...] [--rates FILE] [--output FILE] [--json]",
        "Search every division of a job over a cluster and print the fastest ones that fit: seconds of a step, memory, "
        "bytes on every link, and why faster ones do not fit. Nothing is measured here: rates are published ones, or "
        "those that `mslm plan calibrate` has written. Exit code 0 if a layout fits, 1 if none does.",
        example="mslm plan --model llama3-405b --cluster h100 --gpus 16384 --global-batch-size 2048",
        notes=OVERRIDES.replace("CONFIG is a YAML file", "M is a preset or a YAML file")
        + "\nC is a100, h100, h200, b200 ..., or a YAML file (docs/plan.md). See also: mslm plan calibrate --help",
    )
    _plan_options(parser)
    own, rest = parser.parse_known_args(tokens)
    _check_options(own)
    from megatron_slm.plan import report
    from megatron_slm.plan.memory_estimate import estimate
    from megatron_slm.plan.search import PINNED, Space, search

    resolved, preset = _model(own.model, rest)
    question, notes = _question(own, resolved)
    space = Space.of(question.config, question.cluster.gpus, question.cluster.gpus_per_node)
    held = _held(resolved)
    space = dataclasses.replace(space, **{axis: (value,) for axis, value in held.items()})
    notes += [f"{PINNED[axis]} = {value} is held, as given." for axis, value in held.items()]
    memory_of = partial(estimate, architecture=question.cluster.architecture)
    found = search(question, space, memory_of, allow_tight=own.tight, top=max(own.top, own.trace, 1))
    found = _traced(found, question, own.trace, own.tight)
    if own.json:
        print(report.to_json(found, question, own.top, own.price, notes))
    else:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        print(report.table(found, question, own.top, own.price))
    if not found.fitting:
        return EXIT_NOTHING_FITS
    if own.output is not None:
        _write(own.output, report.to_yaml(found.fitting[0].config, preset, _header(found.fitting[0], question)))
        print(f"mslm: the fastest one is in {own.output}; mslm train {own.output} data.data_path=...", file=sys.stderr)
    return EXIT_OK


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="M", help="a preset (mslm check --preset), or a YAML file")
    parser.add_argument("--cluster", metavar="C", help="a known GPU, or a YAML file; default what --rates has measured")
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks of the job; default all of the cluster, or a node")
    parser.add_argument("--rates", type=path_of, metavar="FILE", help="rates measured by mslm plan calibrate")
    parser.add_argument(
        "--top", type=int, default=10, metavar="N", help="layouts that are shown (default: %(default)s)"
    )
    parser.add_argument(
        "--tight", action="store_true", help="take layouts too that are expected to fit, but might not (tight)"
    )
    parser.add_argument(
        "--trace",
        type=int,
        default=0,
        metavar="N",
        help="run the real modules of the N fastest in the dry world, as mslm memory does, and judge them by that "
        "(seconds each; default: %(default)s)",
    )
    parser.add_argument("--price", type=float, metavar="P", help="of a GPU-hour: shows the cost of a billion tokens")
    parser.add_argument("--output", type=path_of, metavar="FILE", help="write the fastest one as a configuration")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _check_options(own: argparse.Namespace) -> None:
    """Refuse numbers that mean nothing, and a place that cannot be written, before the search."""
    if own.top < 1 or own.trace < 0 or (own.gpus is not None and own.gpus < 1):
        given = f"--top {own.top}, --trace {own.trace}" + (f", --gpus {own.gpus}" if own.gpus is not None else "")
        raise ConfigError(f"{given}: --top and --gpus must be at least 1, --trace at least 0.")
    if own.price is not None and not 0 < own.price < math.inf:
        raise ConfigError(f"--price {own.price} must be a number above 0: what one GPU costs an hour.")
    if own.cluster is None and own.rates is None:
        raise ConfigError("--cluster is missing: name a GPU (a100, h100, h200, b200 ...) or a YAML file.")
    if own.output is not None:
        _require_writable(own.output)


def _model(model: str, rest: Sequence[str]) -> tuple[Resolved, str | None]:
    """The configuration of a preset or a file, and the preset it comes from."""
    from megatron_slm.config.presets import PRESETS

    if model not in PRESETS and not Path(model).is_file():
        raise ConfigError(
            f"--model {model}: there is no such preset and no such file. The presets are {', '.join(PRESETS)}."
        )
    resolved = resolve([f"preset={model}", *rest] if model in PRESETS else [model, *rest])
    return resolved, resolved.config.preset


def _held(resolved: Resolved) -> dict[str, Any]:
    """Axes that the command line names, with their values; what a file says of its layout is searched anew."""
    from megatron_slm.config.load import value_of
    from megatron_slm.plan.search import PINNED

    values = {
        axis: value_of(resolved.config, key)
        for axis, key in PINNED.items()
        if resolved.provenance[key] == "command line"
    }
    return {axis: 1 if value is None else value for axis, value in values.items()}


def _question(own: argparse.Namespace, resolved: Resolved) -> tuple[Question, list[str]]:
    """The job on the cluster, and what was assumed."""
    from megatron_slm.plan.cost import FP8_SHARE
    from megatron_slm.plan.predict import Question
    from megatron_slm.plan.rates import rates_of

    cluster = _cluster(own)
    config, notes = resolved.config, []
    if config.model.vocab_size is None:
        raise ConfigError(
            f"--model {own.model} leaves its vocabulary to the tokenizer, but the output layer's cost depends on it. "
            "Add --vocab-size N."
        )
    if not config.precision.bf16 and resolved.provenance["precision.bf16"] == "default":
        config = dataclasses.replace(config, precision=dataclasses.replace(config.precision, bf16=True))
        notes.append("precision.bf16 is not given: true is taken.")
    if not config.precision.bf16:
        raise ConfigError("precision.bf16 = false: rates are known for bf16 alone. Leave it out, or set it to true.")
    if resolved.provenance["train.global_batch_size"] == "default":
        size = max(1, round(TOKENS_OF_A_STEP / config.model.seq_length / cluster.gpus)) * cluster.gpus
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch_size=size))
        notes.append(f"train.global_batch_size is not given: {size} is taken, a multiple of the GPUs near 4 Mi tokens.")
    if config.stage != "pretrain":
        notes.append(
            f"stage = {config.stage}: seconds and memory are those of a training step of the trained model alone. What "
            "the stage has beside it (rollouts, reference, critic, teacher, reward model) is in none of these figures; "
            "mslm memory counts those models: check the layout with it."
        )
    if config.precision.fp8 is not None:
        notes.append(
            f"products in FP8 are taken to reach {FP8_SHARE:g} times the share of their peak that bf16 reaches of its "
            "own: fitted on H100 (docs/plan.md), not measured here."
        )
    return Question(config, cluster, rates_of(cluster.architecture, own.rates)), notes


def _cluster(own: argparse.Namespace) -> Cluster:
    from megatron_slm.plan.cluster import cluster_of, from_values
    from megatron_slm.plan.rates import cluster_record

    if own.cluster is not None:
        cluster = cluster_of(own.cluster)
    elif (values := cluster_record(own.rates)) is not None:
        cluster = from_values(values, str(own.rates))
    else:
        raise ConfigError(f"--rates {own.rates} describes no cluster. Add --cluster.")
    return cluster.of_gpus(own.gpus if own.gpus is not None else cluster.gpus)


def _traced(found: Found, question: Question, count: int, allow_tight: bool) -> Found:
    """The same with the memory of its fastest layouts traced instead of estimated."""
    if not count:
        return found
    from megatron_slm.parallel.device import preload

    preload("cpu")
    from megatron_slm.memory.capacity import SEEN_BY_TORCH_BYTES
    from megatron_slm.plan.memory_estimate import MemoryRange
    from megatron_slm.run_dry import job_ledgers

    capacity, gpu = question.cluster.memory_bytes, question.cluster.name
    kept: list[Candidate] = []
    large: list[Candidate] = []
    for candidate in found.fitting[:count]:
        ledgers = job_ledgers(candidate.config, gpu=gpu if gpu in SEEN_BY_TORCH_BYTES else None)
        worst = max(ledgers, key=lambda one: one.size)
        memory = MemoryRange(float(worst.low), float(worst.size), float(worst.high))
        verdict = memory.verdict(capacity)
        fits = verdict == "fits" or (allow_tight and verdict == "tight" and memory.expected <= capacity)
        (kept if fits else large).append(dataclasses.replace(candidate, memory=memory, verdict=verdict))
    return dataclasses.replace(found, fitting=[*kept, *found.fitting[count:]], near_misses=[*large, *found.near_misses])


def _header(candidate: Candidate, question: Question) -> list[str]:
    """What stands above the written configuration."""
    prediction, memory = candidate.prediction, candidate.memory
    return [
        f"mslm plan: the fastest layout on {question.cluster.gpus} x {question.cluster.name}, predicted, not measured:",
        f"step {prediction.step_seconds:.3f} s, MFU {100 * prediction.mfu:.1f} %, memory {memory.low / 2**30:.1f} to "
        f"{memory.high / 2**30:.1f} GiB of {question.cluster.memory_gib:.1f}",
    ]


def _require_writable(file: Path) -> None:
    """Refuse a place for the result before minutes are spent on it.

    Raises:
        ConfigError: it cannot be written to.
    """
    try:
        file.open("a").close()
    except OSError as error:
        raise ConfigError(
            f"--output {file} cannot be written ({error.strerror}). Name a file in a directory of yours."
        ) from error


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def calibrate(name: str, tokens: Sequence[str]) -> int:
    """``mslm plan calibrate``: measure this machine's rates."""
    parser = parser_of(
        name,
        "--output FILE [--ranks N] [--device cpu|cuda]",
        "Measure matrix products, memory and collectives on this machine, fit the planner's constants to them and "
        "write them with their spread and where they come from; mslm plan --rates FILE uses them. Without a launcher "
        "the ranks are started here; under torchrun or srun on several nodes the links between nodes are measured too.",
        example="mslm plan calibrate --ranks 2 --device cpu --output rates.json",
    )
    parser.add_argument("--output", required=True, type=path_of, metavar="FILE", help="where the rates are written")
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks to start; default 2, or one for each GPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    own = parser.parse_args(tokens)
    if own.ranks is not None and own.ranks < 1:
        raise ConfigError(f"--ranks {own.ranks} must be at least 1; 2 or more measure collectives.")
    _require_writable(own.output)
    from megatron_slm.launch.environment import from_environment
    from megatron_slm.launch.rank import run_rank
    from megatron_slm.parallel.device import choose_device, preload

    device = choose_device(own.device)

    def entry(environment: RankEnvironment) -> int:
        preload(device)
        from megatron_slm.plan.measure_rank import measure_rank

        measure_rank(environment, device, own.output)
        return EXIT_OK

    environment = from_environment(os.environ)
    if environment is not None:
        return run_rank(environment, entry)
    from megatron_slm.launch.local import run_local

    command = [sys.executable, "-m", "megatron_slm.cli", *name.split(), *tokens]
    code = run_local(
        own.ranks or _default_ranks(device),
        entry,
        preload=lambda: preload("cpu"),
        warm=device == "cpu",
        command=command,
    )
    if code == EXIT_OK:
        print(f"mslm: rates are in {own.output}; mslm plan --rates {own.output} ...", file=sys.stderr)
        if (doubt := _doubt(own.output)) is not None:
            print(f"mslm: {doubt}", file=sys.stderr)
    return code


def _doubt(file: Path) -> str | None:
    """What speaks against rates that were measured just now."""
    spread = json.loads(file.read_text(encoding="utf-8"))["rates"]["spread"]
    wide = [f"{name} ({low:.3g} to {high:.3g})" for name, (low, high) in spread.items() if high > WIDE * low]
    if not wide:
        return None
    return f"measurements differ widely in {', '.join(wide)}. Measure again while nothing else runs on this machine."


def _default_ranks(device: str) -> int:
    """Two CPU ranks, or one for each GPU of this machine."""
    if device == "cpu":
        return 2
    import torch

    return torch.cuda.device_count()


VERBS: Mapping[str, Verb] = {
    "plan": Verb("search the fastest layout of a job on a cluster", plan),
    "plan calibrate": Verb("measure this machine's rates for the planner", calibrate),
}
