"""The composition root: a resolved configuration becomes layout, groups, data, model, optimizer, hooks; the loop runs.

Read ``train`` and ``assembled`` first, top to bottom: it is the order in which things are built. The functions below
them each build one part; a newcomer may skip them. This is the only file that knows all rooms.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_slm.config import rules
from megatron_slm.config.load import Resolved
from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.loader import TrainLoader
from megatron_slm.data.loader_dali import DaliLoader
from megatron_slm.data.mixture import described
from megatron_slm.doctor import determinism
from megatron_slm.doctor.sources import Target
from megatron_slm.errors import ConfigError
from megatron_slm.launch.environment import RankEnvironment
from megatron_slm.launch.signals import StopRequest
from megatron_slm.memory.watch import explained_out_of_memory
from megatron_slm.model.ending import Ending, Scalar
from megatron_slm.parallel import device as device_seam
from megatron_slm.parallel.fp8 import require_engine
from megatron_slm.parallel.groups import process_groups
from megatron_slm.parallel.layout import Layout
from megatron_slm.run_beside import Beside, beside_of, inputs_of, require_isolated_documents
from megatron_slm.run_data import Data, data_record, identity, open_data
from megatron_slm.run_examples import example_loader, open_examples
from megatron_slm.run_hooks import (
    announce,
    build_hooks,
    build_interventions,
    identity_digest,
    memory_command,
    open_log,
    stop_rule,
    writes_log,
)
from megatron_slm.run_model import BuiltModel, build_model
from megatron_slm.run_parts import Run
from megatron_slm.run_policy import own_parts
from megatron_slm.run_stage import loss_of
from megatron_slm.run_watch import failures_noted, watching_hooks
from megatron_slm.train import run_directory
from megatron_slm.train.ema import Ema
from megatron_slm.train.guard import Guard
from megatron_slm.train.hook import Hook
from megatron_slm.train.loop import run_loop
from megatron_slm.train.optimizer import kernels_reason
from megatron_slm.train.origin import Origin, restore, verify_origin
from megatron_slm.train.run_directory import RunDirectory
from megatron_slm.train.saved_state import layout_record
from megatron_slm.train.schedule import learning_rate
from megatron_slm.train.step import StepPlan, TrainState


def train(resolved: Resolved, environment: RankEnvironment, *, fresh: bool = False) -> int:
    """Train one configuration on this rank, from its newest checkpoint if its directory holds one. Collective.

    Args:
        fresh: move an existing run of this name aside and start anew.

    Returns:
        0 when the target was reached; 75 when the run was stopped and saved before.

    Raises:
        UserError: the configuration, the data or the checkpoint is refused; nothing was changed.
    """
    config = resolved.config
    with assembled(resolved, environment, fresh=fresh) as run, memory_explained(run), failures_noted(run):
        beside = beside_of(run)
        require_isolated_documents(run, beside)
        return run_loop(
            run.state,
            run.plan,
            inputs_of(run, beside),
            hooks_of(run, beside),
            train_iters=config.train.train_iters,
            should_stop=stop_rule(config, run.stop),
            guard=Guard(config.train, run.state.records.get("guard")),
            interventions=build_interventions(resolved, run.data, run.loader, run.layout, run.directory, run.log),
        )


def hooks_of(run: Run, beside: Beside) -> list[Hook]:
    """Everything that takes part in the run beside its steps, in the order in which it is told of them."""
    first, behind = watching_hooks(run)
    own = build_hooks(
        run.resolved,
        run.data,
        run.plan,
        run.state,
        layout=run.layout,
        directory=run.directory,
        log=run.log,
        beside=beside,
    )
    return [*first, *own, *behind]


def memory_explained(run: Run) -> AbstractContextManager[None]:
    """Says where every byte was to go when there are too few of them, where the run watches its memory."""
    config = run.resolved.config
    if not config.log.memory_ledger:
        return nullcontext()
    return explained_out_of_memory(
        run.directory.path,
        memory_command(config, run.directory, run.layout, run.plan.device, run.data.tokenizer.vocab_size),
        rank=dist.get_rank(),
        pipeline_rank=run.plan.groups.pp.rank(),
    )


@contextmanager
def assembled(resolved: Resolved, environment: RankEnvironment, *, fresh: bool) -> Iterator[Run]:
    """The parts of a run, which owns its directory, process groups and signals as long as it lasts. Collective.

    Raises:
        UserError: the configuration, the data or the checkpoint is refused; nothing was changed.
    """
    config = resolved.config
    device = device_seam.choose_device(config.parallel.device)
    device_seam.preload(device)
    if config.precision.fp64 and device == "cuda":
        raise ConfigError(
            "precision.fp64 needs CPU ranks: core's optimizer rounds to fp32 on a GPU; set parallel.device=cpu"
        )
    require_engine(config.precision, device)
    rules.require(config, environment.world_size, provenance=resolved.provenance)
    held = deterministic(config, device, environment) if config.train.deterministic else None
    layout = Layout.from_config(config.parallel, environment.world_size)

    data = (open_data if config.stage == "pretrain" else open_examples)(config, verify=environment.rank == 0)
    vocab_size = config.model.vocab_size or data.tokenizer.vocab_size
    directory = RunDirectory(Path(config.log.runs_dir) / str(config.name))
    master = (environment.master_addr, environment.master_port)
    bound = device_seam.bind(device, environment.local_rank)
    with (
        own_directory(resolved, data, environment, device, fresh=fresh, held=held)
        if environment.rank == 0
        else nullcontext() as accepted,
        process_groups(
            config.parallel, device=device, rank=environment.rank, world_size=environment.world_size, master=master
        ) as groups,
        # Not before: a rank that still waits for the others has nothing to finish, and would not hear a signal.
        StopRequest() as stop,
    ):
        state, spec_reason = build_state(config, data, groups, bound, vocab_size)
        warning, origin = restore(state, config, accepted, layout=layout_record(layout))
        plan = step_plan(config, groups, bound)
        log = None
        if writes_log(environment):
            log = open_log(config, directory, layout, device, vocab_size, step=state.step, loss_name=plan.logged[0])
        if log is not None:
            reasons = [spec_reason, kernels_reason(state.optimizer), *described(state.cursor.order), *origin]
            announce(log, config, layout, vocab_size, reasons)
            if warning is not None:
                log.warn(warning)
        loader = train_loader(config, data, groups, bound)
        yield Run(resolved, layout, data, directory, stop, state, plan, loader, log)
        dist.barrier()  # a rank that leaves first would end another's last exchange


def deterministic(config: RunConfig, device: str, environment: RankEnvironment) -> Target:
    """Make this rank deterministic; gives the job as it was judged.

    Raises:
        ConfigError: a source of nondeterminism is active.
    """
    target = determinism.target_of(config, device, environment.world_size, os.environ)
    determinism.hold(target)
    return target


@contextmanager
def own_directory(
    resolved: Resolved,
    data: Data,
    environment: RankEnvironment,
    device: str,
    *,
    fresh: bool,
    held: Target | None = None,
) -> Iterator[Origin]:
    """Take the run's directory for as long as the run lasts: create it, or accept the one there. Rank 0 alone.

    Gives what the run's state is to be read from. ``held`` is the job of a deterministic run.

    Raises:
        CheckpointError: another job uses it, it holds another run, or what it would resume is damaged;
            nothing was changed.
    """
    directory = RunDirectory(Path(resolved.config.log.runs_dir) / str(resolved.config.name))
    fields = identity(resolved.config, data)
    contract = determinism.contract(held, device_seam.device_name(device)) if held is not None else None
    with run_directory.locked(directory):
        if not fresh:
            run_directory.check(resolved, identity=fields)
            if contract is not None:
                determinism.require_same(directory.path, contract)
        start = Cursor.start(data.order, data.tokenizer.hash)
        digest = identity_digest(resolved, data)
        origin = verify_origin(resolved.config, directory.checkpoints, start, digest, fresh=fresh)
        run_directory.prepare(
            resolved,
            identity=fields,
            fresh=fresh,
            data=data_record(data),
            environment={
                "launcher": environment.launcher,
                "world_size": environment.world_size,
                "device": device_seam.device_name(device),
                "threads_per_rank": torch.get_num_threads(),
                "determinism": contract,
            },
        )
        yield origin


def build_state(
    config: RunConfig, data: Data, groups: Any, device: torch.device, vocab_size: int
) -> tuple[TrainState, str]:
    """Model, gradient buffers, optimizer and random streams of a new run, and why its layers are what they are."""
    model = build_model(config, groups, device, vocab_size)
    state = TrainState(model.chunks, model.optimizer, model.random, Cursor.start(data.order, data.tokenizer.hash))
    if config.train.ema_decay is not None:
        state.parts["ema"] = Ema(model.optimizer, model.chunks, decay=config.train.ema_decay, groups=groups)

    def build(own: RunConfig, ending: Ending | Scalar) -> BuiltModel:
        return build_model(own, groups, device, vocab_size, ending)

    state.parts |= own_parts(config, device, groups, build)
    return state, model.reason


def train_loader(config: RunConfig, data: Data, groups: Any, device: torch.device) -> Any:
    """Training samples of this data-parallel rank: text, or the examples of the stage."""
    if config.stage != "pretrain":
        return example_loader(config, data, groups)
    through_dali = partial(DaliLoader, device_id=device.index if device.type == "cuda" else None)
    made: Callable[..., TrainLoader] = through_dali if config.data.loader == "dali" else TrainLoader
    return made(
        data.train,
        config=config.data,
        seq_length=config.model.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_rank=groups.dp.rank(),
        data_parallel_size=groups.dp.size(),
    )


def step_plan(config: RunConfig, groups: Any, device: torch.device) -> StepPlan:
    """What every step of the run has in common."""
    loss = loss_of(config, groups)
    return StepPlan(
        loss=loss.function,
        learning_rate=partial(
            learning_rate, schedule=config.schedule, optimizer=config.optimizer, train_iters=config.train.train_iters
        ),
        peak_learning_rate=config.optimizer.lr,
        seq_length=config.model.seq_length,
        groups=groups,
        device=device,
        logged=loss.logged,
    )
