"""What takes part in a run beside its steps: the log, validation, checkpoints, and when to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_slm.config.load import Resolved
from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.loader import ValidLoader
from megatron_slm.evaluate.perplexity import held_out
from megatron_slm.launch.environment import RankEnvironment
from megatron_slm.launch.signals import StopRequest
from megatron_slm.model.counts import flops_per_token, parameters
from megatron_slm.parallel import device as device_seam
from megatron_slm.parallel.gradients import gathered_parameters
from megatron_slm.parallel.layout import Layout
from megatron_slm.run_data import Data
from megatron_slm.stages import pretrain
from megatron_slm.train import checkpoint
from megatron_slm.train.hook import Hook
from megatron_slm.train.hooks import CheckpointHook, ValidationHook
from megatron_slm.train.memory_use import memory_source
from megatron_slm.train.metrics import Throughput
from megatron_slm.train.metrics_writer import MetricsWriter
from megatron_slm.train.run_directory import RunDirectory
from megatron_slm.train.step import StepPlan, TrainState


def evaluation(
    config: RunConfig, data: Data, plan: StepPlan, log: MetricsWriter | None
) -> Callable[[TrainState], None]:
    """A function that evaluates the held-out samples, the same ones each time, and reports the loss."""
    assert data.valid is not None, "open_data opens the held-out split wherever eval_iters is not 0"
    loader = ValidLoader(
        data.valid,
        config=config.data,
        seq_length=config.model.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_rank=plan.groups.dp.rank(),
        data_parallel_size=plan.groups.dp.size(),
    )
    interleaved = config.parallel.vpp_size > 1

    def evaluate(state: TrainState) -> None:
        steps = loader.steps(
            config.train.eval_iters,
            config.train.global_batch_size,
            multiple=config.parallel.pipeline_model_parallel_size if interleaved else 1,
        )
        on_device = ([pretrain.to_device(batch, plan.device) for batch in step] for step in steps)
        found = held_out(
            state.chunks, on_device, plan.loss, seq_length=plan.seq_length, groups=plan.groups, device=plan.device
        )
        if log is not None:
            log.validation(
                found.loss, tokens=found.tokens, step=state.step, consumed_samples=state.cursor.consumed_samples
            )

    return evaluate


def build_hooks(
    resolved: Resolved,
    data: Data,
    plan: StepPlan,
    layout: Layout,
    directory: RunDirectory,
    log: MetricsWriter | None,
) -> list[Hook]:
    """Log, validation, checkpoint. At the end they are called in reverse: the save comes first, the log closes last."""
    config = resolved.config
    hooks: list[Hook] = [log] if log is not None else []
    if config.train.eval_iters:
        hooks.append(ValidationHook(evaluation(config, data, plan, log), config.train.eval_interval))
    if config.precision.fp64:
        # Core gathers optimizer state in fp32: such a checkpoint could not be resumed bitwise, so there is none.
        if log is not None:
            log.say("precision.fp64: no checkpoint is saved, because core stores optimizer states in fp32")
        return hooks
    save = partial(save_checkpoint, resolved=resolved, data=data, layout=layout, directory=directory)
    listeners = [hook for hook in hooks if hook is log]
    hooks.append(CheckpointHook(save, config.checkpoint.save_interval, listeners))
    return hooks


def save_checkpoint(
    state: TrainState, *, resolved: Resolved, data: Data, layout: Layout, directory: RunDirectory
) -> Path:
    """Write and publish the state's checkpoint. Collective."""
    saved = checkpoint.SavedState(
        step=state.step,
        consumed_samples=state.cursor.consumed_samples,
        cursor=state.cursor.to_dict(),
        layout=layout_record(layout),
        params_dtype=resolved.config.precision.params_dtype,
        tokenizer_hash=data.tokenizer.hash,
    )

    def add_files(temporary: Path) -> None:
        (temporary / "config.yaml").write_text(resolved.to_yaml())
        checkpoint.write_tokenizer(data.tokenizer.model, temporary)

    with gathered_parameters(state.chunks):
        return checkpoint.save(
            directory.checkpoints, saved, state.chunks, state.optimizer, state.random, add_files=add_files
        )


def layout_record(layout: Layout) -> dict[str, int]:
    """The degrees under which random states have their owners."""
    return {"world_size": layout.world_size, "vpp": layout.vpp_size, **layout.sizes}


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
    config: RunConfig, directory: RunDirectory, layout: Layout, device: str, vocab_size: int, step: int
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
    )


def announce(log: MetricsWriter, config: RunConfig, layout: Layout, vocab_size: int, reasons: list[str]) -> None:
    """How a run's log begins: the model, how it is divided, why its kernels are what they are, where it starts."""
    degrees = " x ".join(f"{axis} {size}" for axis, size in layout.sizes.items())
    log.say(f"{config.name}: {parameters(config.model, vocab_size):,} parameters, vocabulary {vocab_size:,}")
    log.say(f"layout: {layout.world_size} ranks = {degrees}, vpp {layout.vpp_size}, {dist.get_backend()}")
    for line in reasons:
        log.say(line)


def writes_log(environment: RankEnvironment) -> bool:
    """The last rank ends the last pipeline stage, so it has the loss; Megatron's log comes from it too."""
    return environment.rank == environment.world_size - 1
