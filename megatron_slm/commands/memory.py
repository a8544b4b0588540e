"""The verb ``mslm memory``: where every byte of every rank goes, without a GPU and without that memory."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slm.commands.command import EXIT_OK, OVERRIDES, Verb, parser_of, path_of, resolve, violations_of
from megatron_slm.config.run_config import RunConfig
from megatron_slm.errors import ConfigError
from megatron_slm.parallel.fp8 import require_engine

if TYPE_CHECKING:
    from megatron_slm.config.load import Resolved

EXIT_DOES_NOT_FIT = 1


def memory(name: str, tokens: Sequence[str]) -> int:
    """``mslm memory``: the ledger of every pipeline stage."""
    parser = parser_of(
        name,
        "[CONFIG] [key=value | --flag ...] [--gpu NAME] [--layers] [--why] [--fit] [--plot FILE] [--json]",
        "Say where every byte goes before anything is queued: the real modules are built and run without values, one "
        "rank of every pipeline stage, and the schedule is replayed. Exit code 0 if it fits or no GPU is named, 1 if "
        "not.",
        example="mslm memory --preset llama3-405b --world-size 16384 parallel.tensor_model_parallel_size=8 "
        "parallel.pipeline_model_parallel_size=16 --gpu h100-80gb",
        notes=OVERRIDES,
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="judge against this GPU's memory (a100-80gb, h100-80gb ... or a cluster's YAML file)",
    )
    parser.add_argument("--cpu", action="store_true", help="as CPU ranks run it; default as parallel.device says")
    parser.add_argument("--stage", type=int, metavar="N", help="this pipeline stage alone")
    parser.add_argument("--layers", action="store_true", help="show every layer of every stage")
    parser.add_argument("--why", action="store_true", help="explain the worst moment")
    parser.add_argument("--fit", action="store_true", help="rank the changes that would save memory")
    parser.add_argument("--plot", type=path_of, metavar="FILE", help="draw it there (.png, .svg)")
    parser.add_argument("--json", action="store_true", help="print every row as JSON")
    own, rest = parser.parse_known_args(tokens)
    resolved = resolve(rest)
    config, notes = whole_batch(resolved)
    resolved = dataclasses.replace(resolved, config=config)
    if found := violations_of(resolved, None, files=False):
        raise ConfigError("\n".join(found))
    for_gpu = not own.cpu and config.parallel.device != "cpu"
    if not for_gpu:
        require_engine(config.precision, "cpu")
    _check_places(own.gpu, own.plot, for_gpu=for_gpu)
    from megatron_slm.parallel.device import preload

    preload("cpu")
    from megatron_slm.memory import report
    from megatron_slm.run_dry import job_ledgers, stage_notes, step_seconds

    notes += stage_notes(config)
    ledgers = partial(job_ledgers, gpu=own.gpu, for_gpu=for_gpu)
    found_ledgers = ledgers(config, stage=own.stage)
    if own.json:
        print(report.to_json(found_ledgers, notes=notes, world_size=config.parallel.world_size))
    else:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        print(_text(found_ledgers, report, own.layers, own.why))
        if own.fit:
            from megatron_slm.memory.fit import changes, fit_table

            seconds = partial(step_seconds, gpu=own.gpu) if own.gpu is not None else None
            print("\n" + fit_table(changes(config, ledgers, seconds)))
    if own.plot is not None:
        from megatron_slm.memory.plot import plot

        plot(found_ledgers, own.plot)
    return EXIT_DOES_NOT_FIT if any(one.verdict == "does not fit" for one in found_ledgers) else EXIT_OK


def _check_places(gpu: str | None, plot: Path | None, *, for_gpu: bool) -> None:
    """Refuse a GPU that is not known or meant, and a picture that cannot be written, before anything is built."""
    from megatron_slm.plan.cluster import ALIASES, CLUSTERS

    if gpu is not None and not for_gpu:
        raise ConfigError(f"--gpu {gpu} with CPU ranks (--cpu, parallel.device=cpu): leave one of them out.")
    if gpu is not None and ALIASES.get(gpu, gpu) not in CLUSTERS and not Path(gpu).is_file():
        names = ", ".join([*CLUSTERS, *ALIASES])
        raise ConfigError(f"--gpu {gpu}: it is not known, and no YAML file either. Known are {names}.")
    if plot is not None and not plot.parent.is_dir():
        raise ConfigError(f"--plot {plot}: there is no directory {plot.parent}. Name a file in one that exists.")


def whole_batch(resolved: Resolved) -> tuple[RunConfig, list[str]]:
    """The configuration with a global batch that fills the pipeline, where none was given; and what was assumed."""
    config = resolved.config
    parallel, train = config.parallel, config.train
    world = parallel.world_size or parallel.smallest_world_size
    notes = [] if parallel.world_size else [f"parallel.world_size is not given: {world} ranks, the fewest, are taken."]
    config = dataclasses.replace(config, parallel=dataclasses.replace(parallel, world_size=world))
    formats = [f"precision.{name}" for name in ("bf16", "fp64")]
    if all(resolved.provenance[key] == "default" for key in formats):
        notes.append("precision.bf16 is not given: everything is in fp32, as train would have it.")
    dp = max(1, world // parallel.model_parallel_size)
    if resolved.provenance["train.global_batch_size"] == "default":
        size = train.micro_batch_size * dp * parallel.pipeline_model_parallel_size * 2
        config = dataclasses.replace(config, train=dataclasses.replace(train, global_batch_size=size))
        notes.append(f"train.global_batch_size is not given: {size}, two micro-batches for every stage, are taken.")
    return config, notes


def _text(found: Sequence[Any], report: Any, with_layers: bool, with_why: bool) -> str:
    worst = max(found, key=lambda one: one.size)
    parts = [
        "GiB of one rank of every pipeline stage, at its worst moment",
        report.table(found),
        "",
        report.bars(found),
    ]
    if with_layers:
        parts += [part for one in found for part in ("", report.layers(one))]
    if with_why:
        parts += ["", report.why(worst), "", report.timeline_picture(worst)]
    return "\n".join(parts)


VERBS: Mapping[str, Verb] = {"memory": Verb("where every byte goes, before a job is queued", memory)}
