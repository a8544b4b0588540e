"""What takes part in a run beside its steps: the log, validation, checkpoints, and when to stop."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_slm.config.load import Resolved
from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.loader import TrainLoader
from megatron_slm.launch.environment import RankEnvironment
from megatron_slm.launch.signals import StopRequest
from megatron_slm.memory.watch import MemoryWatch
from megatron_slm.model.counts import flops_per_token, parameters_text
from megatron_slm.parallel import device as device_seam
from megatron_slm.parallel.gradients import gathered_parameters
from megatron_slm.parallel.groups import background_group
from megatron_slm.parallel.layout import AXES, Layout
from megatron_slm.profile.watch import StepProfile
from megatron_slm.replay import capsule, manifest, source
from megatron_slm.replay.again import Passes
from megatron_slm.replay.kept import TOKENIZER
from megatron_slm.replay.recorder import Recorder
from megatron_slm.replay.slots import joined
from megatron_slm.replay.witness import Witness
from megatron_slm.run_beside import Beside
from megatron_slm.run_data import Data, data_record, identity
from megatron_slm.run_validation import evaluation
from megatron_slm.train import checkpoint, origin, run_directory
from megatron_slm.train.attribution import investigation
from megatron_slm.train.batch_size import global_batch_size_at
from megatron_slm.train.early_stopping import EarlyStopping
from megatron_slm.train.hook import Hook
from megatron_slm.train.hooks import CheckpointHook, ValidationHook
from megatron_slm.train.intervention import Interventions
from megatron_slm.train.layer_norms import LayerNorms
from megatron_slm.train.memory_use import memory_source
from megatron_slm.train.metrics import Throughput
from megatron_slm.train.metrics_writer import MetricsWriter
from megatron_slm.train.noise_scale import NoiseScale
from megatron_slm.train.retention import Retention
from megatron_slm.train.router_statistics import RouterStatistics
from megatron_slm.train.run_directory import RunDirectory
from megatron_slm.train.saved_state import SavedState, layout_record
from megatron_slm.train.step import StepPlan, TrainState


def build_hooks(
    resolved: Resolved,
    data: Data,
    plan: StepPlan,
    state: TrainState,
    *,
    layout: Layout,
    directory: RunDirectory,
    log: MetricsWriter | None,
    beside: Beside | None = None,
) -> list[Hook]:
    """What the log's line shows of the experts, log, memory, averages, measurements, fingerprints, validation,
    checkpoint.

    At the end they are called in reverse: the save comes first, the log closes last.
    """
    config = resolved.config
    hooks: list[Hook] = []
    if (steps := config.profile.chosen) is not None:
        told = log.say if log is not None else lambda line: None
        hooks.append(StepProfile(config.profile, steps, plan, directory.path, told))
    hooks += [router_statistics(config, log)] if config.model.num_moe_experts is not None else []
    hooks += [log] if log is not None else []
    if config.log.memory_ledger:
        command = memory_command(config, directory, layout, plan.device, data.tokenizer.vocab_size)
        say = log.say if log is not None else None
        hooks.append(MemoryWatch(plan, directory.path, command, say, rank=dist.get_rank()))
    hooks += [part for part in state.parts.values() if isinstance(part, Hook)]
    hooks += dynamics_hooks(config, plan, log)
    if config.replay.records:
        hooks.append(recorder(resolved, data, plan, state, layout=layout, directory=directory))
    if config.replay.whole_steps:
        folder = directory.path / capsule.FOLDER
        hooks.append(Witness(folder, plan.groups, rank=dist.get_rank(), last=config.replay.whole_steps))
    if config.replay.sdc_every is not None:
        hooks.append(passes(config, plan, layout, log))
    if config.train.eval_iters:
        hooks.append(validation_hook(config, data, plan, state, log, beside or Beside()))
    hooks.append(checkpoint_hook(resolved, data, layout, directory, log))
    return hooks


def recorder(
    resolved: Resolved, data: Data, plan: StepPlan, state: TrainState, *, layout: Layout, directory: RunDirectory
) -> Recorder:
    """Records fingerprints; what beside them decides the run's numbers is written here."""
    folder, rank = directory.path / capsule.FOLDER, dist.get_rank()
    if rank == 0:
        found = manifest.run_manifest(resolved, data_record(data), layout, step=state.step)
        found["cursor"] = state.cursor.to_dict()
        found["code"] |= source.keep_difference(folder, state.step)
        manifest.write(capsule.run_path(folder, state.step), found)  # makes the folder
        data.tokenizer.save(folder / TOKENIZER)
    own = manifest.rank_manifest(state.chunks, plan.device, rank=rank, step=state.step)
    manifest.write(capsule.rank_path(folder, rank, state.step), own)
    return Recorder(resolved.config.replay, folder, rank=rank, world_size=layout.world_size)


def passes(config: RunConfig, plan: StepPlan, layout: Layout, log: MetricsWriter | None) -> Passes:
    """Makes forward and backward of some steps twice."""
    groups = {axis: layout.groups_of(axis) for axis in AXES}
    replicas = joined(range(layout.world_size), groups, all_of_them=layout.expert_model_parallel_size > 1)
    warn = log.warn if log is not None else lambda line: None
    return Passes(config.replay.sdc_every or 1, plan, replicas, warn, stops=config.replay.on_fault == "stop")


def memory_command(
    config: RunConfig, directory: RunDirectory, layout: Layout, device: torch.device, vocab_size: int
) -> list[str]:
    """What ``mslm memory`` is asked about this run."""
    return [
        str(directory.path / "config.yaml"),
        f"parallel.world_size={layout.world_size}",
        f"model.vocab_size={config.model.vocab_size or vocab_size}",
        *(["--cpu"] if device.type == "cpu" else []),
    ]


def router_statistics(config: RunConfig, log: MetricsWriter | None) -> RouterStatistics:
    """Measures the load of the experts for every line of the log."""
    write = log.beside_step if log is not None else None
    return RouterStatistics(config.log.log_interval, config.train.train_iters, config.model, write)


def dynamics_hooks(config: RunConfig, plan: StepPlan, log: MetricsWriter | None) -> list[Hook]:
    """What measures the training itself, where it is asked for."""
    hooks: list[Hook] = []
    write = log.dynamics if log is not None else None
    if config.log.noise_scale_interval is not None:
        hooks.append(NoiseScale(config.log.noise_scale_interval, plan, write))
    if config.log.layer_norms_interval is not None:
        hooks.append(
            LayerNorms(
                config.log.layer_norms_interval,
                config.model.num_layers,
                plan.groups,
                write,
                predictions=config.model.mtp_num_layers or 0,
            )
        )
    return hooks


def validation_hook(
    config: RunConfig,
    data: Data,
    plan: StepPlan,
    state: TrainState,
    log: MetricsWriter | None,
    beside: Beside,
) -> ValidationHook:
    """Evaluates the held-out samples, and ends the run early where that is configured."""
    patience = config.train.early_stopping_patience
    return ValidationHook(
        evaluation(config, data, plan, log, beside),
        config.train.eval_interval,
        EarlyStopping(patience, state.records.get("early_stopping")) if patience is not None else None,
        log.say if log is not None else lambda line: None,
    )


def checkpoint_hook(
    resolved: Resolved, data: Data, layout: Layout, directory: RunDirectory, log: MetricsWriter | None
) -> CheckpointHook:
    """Saves the run as ``checkpoint`` in the configuration says. Collective."""
    config = resolved.config.checkpoint

    def add_files(temporary: Path) -> None:
        (temporary / "config.yaml").write_text(resolved.to_yaml(), encoding="utf-8")
        (temporary / "tokenizer").mkdir()
        data.tokenizer.save(temporary / "tokenizer")

    to = checkpoint.Destination(
        directory.checkpoints,
        identity=identity_digest(resolved, data),
        add_files=add_files,
        retention=Retention(config.keep_last, config.save_retain_interval),
        group=background_group(resolved.config.parallel) if config.async_save else None,
    )

    def stage(state: TrainState) -> Callable[[], Path]:
        saved = SavedState(
            step=state.step,
            consumed_samples=state.cursor.consumed_samples,
            cursor=state.cursor.to_dict(),
            layout=layout_record(layout),
            params_dtype=resolved.config.precision.params_dtype,
            tokenizer_hash=data.tokenizer.hash,
            records=copy.deepcopy(state.records),
            parts=sorted(state.parts),
        )
        with gathered_parameters(state.chunks):
            return partial(checkpoint.write, checkpoint.stage(saved, state, copy=config.async_save), to)

    listeners, say = ([log], log.say) if log is not None else ([], lambda line: None)
    return CheckpointHook(
        stage, origin.is_finite, config.save_interval, background=config.async_save, listeners=listeners, say=say
    )


def identity_digest(resolved: Resolved, data: Data) -> str:
    """Digest of what makes two runs the same run; every checkpoint carries it."""
    return run_directory.digest(run_directory.identity_fields(resolved, identity(resolved.config, data)))


def batch_sizes(config: RunConfig) -> Callable[[int], int]:
    """Samples of the global batch that begins after so many samples."""
    return partial(global_batch_size_at, train=config.train)


def build_interventions(
    resolved: Resolved,
    data: Data,
    loader: TrainLoader,
    layout: Layout,
    directory: RunDirectory,
    log: MetricsWriter | None,
) -> Interventions:
    """How this run finds the origin of a value that is not finite, and how it rolls back."""

    def roll_back(state: TrainState) -> str | None:
        with gathered_parameters(state.chunks):
            return origin.roll_back(
                state, directory.checkpoints, identity_digest(resolved, data), layout=layout_record(layout)
            )

    return Interventions(
        warn=log.warn if log is not None else lambda line: None,
        investigate=investigation(loader),
        roll_back=roll_back,
    )


def stop_rule(config: RunConfig, stop: StopRequest) -> Callable[[int], bool]:
    """When this rank wants the run to stop before its target: a signal, a step or a duration."""
    started = time.monotonic()
    interval, minutes = config.train.exit_interval, config.train.exit_duration_in_mins

    def should_stop(step: int) -> bool:
        if stop.requested or (interval is not None and step % interval == 0):
            return True
        return minutes is not None and time.monotonic() - started >= 60.0 * minutes

    return should_stop


def open_log(
    config: RunConfig,
    directory: RunDirectory,
    layout: Layout,
    device: str,
    vocab_size: int,
    *,
    step: int,
    loss_name: str,
) -> MetricsWriter:
    """The run's log, continued after ``step``."""
    return MetricsWriter(
        directory.path,
        config.log,
        step=step,
        train_iters=config.train.train_iters,
        seq_length=config.model.seq_length,
        throughput=Throughput.of(
            flops_per_token(config.model, vocab_size),
            layout.world_size,
            device_name=device_seam.device_name(device),
            params_dtype=config.precision.params_dtype,
        ),
        memory=memory_source(device),
        loss_name=loss_name,
    )


def announce(log: MetricsWriter, config: RunConfig, layout: Layout, vocab_size: int, reasons: list[str]) -> None:
    """How a run's log begins: the model, how it is divided, why its kernels are what they are, where it starts."""
    degrees = " x ".join(f"{axis} {size}" for axis, size in layout.sizes.items())
    count = parameters_text(config.model, vocab_size, config.lora)
    log.say(f"{config.name}: {count} parameters, vocabulary {vocab_size:,}")
    log.say(f"layout: {layout.world_size} ranks = {degrees}, vpp {layout.vpp_size}, {dist.get_backend()}")
    for line in reasons:
        log.say(line)


def writes_log(environment: RankEnvironment) -> bool:
    """The last rank ends the last pipeline stage, so it has the loss; Megatron's log comes from it too."""
    return environment.rank == environment.world_size - 1
