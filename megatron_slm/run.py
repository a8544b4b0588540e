"""The composition root: a resolved configuration becomes layout, groups, data, model, optimizer, hooks; the loop runs.

Read ``train`` first, top to bottom: it is the order in which things are built. The functions below it each build one
part; a newcomer may skip them. This is the only file that knows all rooms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_slm.config import rules
from megatron_slm.config.load import Resolved
from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.corpus import HASH_LIMIT_BYTES, Corpus
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.loader import TrainLoader, ValidLoader
from megatron_slm.data.order import SampleOrder
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import ConfigError, DataError
from megatron_slm.evaluate.perplexity import held_out
from megatron_slm.launch.environment import RankEnvironment
from megatron_slm.launch.signals import StopRequest
from megatron_slm.model.core_config import transformer_config
from megatron_slm.model.counts import flops_per_token, parameters
from megatron_slm.model.gpt import build_chunks
from megatron_slm.parallel import device as device_seam
from megatron_slm.parallel.gradients import gathered_parameters, wrap
from megatron_slm.parallel.groups import process_groups
from megatron_slm.parallel.layout import Layout
from megatron_slm.parallel.specs import choose_spec
from megatron_slm.stages import pretrain
from megatron_slm.train import checkpoint, run_directory
from megatron_slm.train.hook import Hook
from megatron_slm.train.hooks import CheckpointHook, ValidationHook
from megatron_slm.train.loop import run_loop
from megatron_slm.train.memory_use import memory_source
from megatron_slm.train.metrics import Throughput
from megatron_slm.train.metrics_writer import MetricsWriter
from megatron_slm.train.optimizer import build_optimizer
from megatron_slm.train.optimizer_state import initialise_state
from megatron_slm.train.origin import restore, shape, verify_origin
from megatron_slm.train.random_state import RandomState
from megatron_slm.train.run_directory import RunDirectory
from megatron_slm.train.schedule import learning_rate
from megatron_slm.train.step import StepPlan, TrainState


@dataclass(frozen=True)
class Data:
    """The corpus of a run: both splits, the tokenizer they were made with, and the order of training."""

    train: Corpus
    valid: Corpus | None
    tokenizer: Tokenizer
    order: SampleOrder


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
    device = device_seam.choose_device(config.parallel.device)
    device_seam.preload(device)
    if config.precision.fp64 and device == "cuda":
        raise ConfigError(
            "precision.fp64 needs CPU ranks: core's optimizer rounds to fp32 on a GPU; set parallel.device=cpu"
        )
    rules.require(config, environment.world_size, provenance=resolved.provenance)
    layout = Layout.from_config(config.parallel, environment.world_size)

    data = open_data(config, verify=environment.rank == 0)
    vocab_size = config.model.vocab_size or data.tokenizer.vocab_size
    directory = RunDirectory(Path(config.log.runs_dir) / str(config.name))
    master = (environment.master_addr, environment.master_port)
    bound = device_seam.bind(device, environment.local_rank)
    with (
        own_directory(resolved, data, environment, device, fresh=fresh) if environment.rank == 0 else nullcontext(),
        StopRequest() as stop,
        process_groups(
            config.parallel, device=device, rank=environment.rank, world_size=environment.world_size, master=master
        ) as groups,
    ):
        state, spec_reason = build_state(config, data, groups, bound, vocab_size)
        origin = restore(state, config, directory.checkpoints, layout=layout_record(layout))
        log = open_log(config, directory, layout, device, vocab_size, state.step) if writes_log(environment) else None
        if log is not None:
            announce(log, config, layout, vocab_size, [spec_reason, origin])
        plan = step_plan(config, groups, bound)
        inputs = pretrain.step_inputs(
            train_loader(config, data, groups), state.cursor, config.train.global_batch_size, bound
        )
        hooks = build_hooks(resolved, data, plan, layout, directory, log)
        code = run_loop(
            state, plan, inputs, hooks, train_iters=config.train.train_iters, should_stop=stop_rule(config, stop)
        )
        dist.barrier()  # a rank that leaves first would end another's last exchange
    return code


def open_data(config: RunConfig, *, verify: bool = False) -> Data:
    """Both splits and their tokenizer, whose hash must be the one in each of them.

    Args:
        verify: compare the hashes of corpora up to ``HASH_LIMIT_BYTES`` too, not the sizes of files alone.

    Raises:
        DataError: something is missing, damaged or does not belong together.
    """
    assert config.data.data_path is not None, "config/files.py refuses a run without data.data_path"
    path = Path(config.data.data_path)
    train = open_corpus(path / "train", verify=verify)
    valid = open_corpus(path / "valid", verify=verify) if config.train.eval_iters else None
    model = Path(config.tokenizer.tokenizer_model or path / "tokenizer" / "tokenizer.model")
    for corpus in filter(None, (train, valid)):
        tokenizer = Tokenizer.open(model, expected_hash=corpus.tokenizer_hash)
        if not corpus.num_samples(config.model.seq_length):
            raise DataError(
                f"{corpus.directory} has {corpus.num_tokens} tokens, too few for one sample of model.seq_length "
                f"{config.model.seq_length}; prepare more text, lower model.seq_length, or set train.eval_iters=0"
            )
    order = SampleOrder(
        train.num_samples(config.model.seq_length), data_seed(config), train.digest, config.model.seq_length
    )
    return Data(train, valid, tokenizer, order)


def open_corpus(directory: Path, *, verify: bool) -> Corpus:
    """One split, hashed where that is asked for and takes seconds."""
    corpus = Corpus.open(directory)
    return Corpus.open(directory, verify="hash") if verify and corpus.num_bytes <= HASH_LIMIT_BYTES else corpus


def data_seed(config: RunConfig) -> int:
    """Seed of the sample order."""
    return config.train.seed if config.data.data_seed is None else config.data.data_seed


def identity(config: RunConfig, data: Data) -> dict[str, Any]:
    """What makes two runs the same run: model, data and seed, derived values filled in."""
    options = {key: value for key, value in asdict(config.data).items() if key != "data_path"}
    return {
        "model": {
            **asdict(config.model),
            **shape(config.model),
            "max_position_embeddings": config.model.position_limit,
            "vocab_size": config.model.vocab_size or data.tokenizer.vocab_size,
        },
        "data": {
            **options,
            "data_seed": data_seed(config),
            "dataset_digest": data.train.digest,
            "tokenizer_hash": data.tokenizer.hash,
        },
        "seed": config.train.seed,
    }


@contextmanager
def own_directory(
    resolved: Resolved, data: Data, environment: RankEnvironment, device: str, *, fresh: bool
) -> Iterator[None]:
    """Take the run's directory for as long as the run lasts: create it, or accept the one there. Rank 0 alone.

    Raises:
        CheckpointError: another job uses it, it holds another run, or what it would resume is damaged;
            nothing was changed.
    """
    directory = RunDirectory(Path(resolved.config.log.runs_dir) / str(resolved.config.name))
    fields = identity(resolved.config, data)
    with run_directory.locked(directory):
        if not fresh:
            run_directory.check(resolved, identity=fields)
        start = Cursor.start(data.order, data.tokenizer.hash)
        verify_origin(resolved.config, directory.checkpoints, start, fresh=fresh)
        run_directory.prepare(
            resolved,
            identity=fields,
            fresh=fresh,
            environment={
                "launcher": environment.launcher,
                "world_size": environment.world_size,
                "device": device_seam.device_name(device),
                "threads_per_rank": torch.get_num_threads(),
            },
        )
        yield


def build_state(
    config: RunConfig, data: Data, groups: Any, device: torch.device, vocab_size: int
) -> tuple[TrainState, str]:
    """Model, gradient buffers, optimizer and random streams of a new run, and why its layers are what they are."""
    random = RandomState(config.train.seed, dp_rank=groups.dp.rank(), pp_rank=groups.pp.rank())
    core = transformer_config(config.model, config.parallel, config.precision, config.train, device=device.type)
    spec, norm, reason = choose_spec(device.type, packed_documents=config.data.reset_attention_mask)
    chunks = build_chunks(
        config.model, core, groups, vocab_size=vocab_size, seed=config.train.seed, spec=(spec, norm), device=device
    )
    half = config.precision.bf16
    chunks = wrap(
        chunks,
        core,
        config.parallel,
        groups,
        reduce_in_fp32=half and config.precision.accumulate_allreduce_grads_in_fp32,
    )
    optimizer = build_optimizer(
        chunks,
        config.optimizer,
        config.precision,
        groups,
        distributed=config.parallel.use_distributed_optimizer,
        width_multiplier=config.model.width_multiplier,
    )
    initialise_state(optimizer)
    return TrainState(chunks, optimizer, random, Cursor.start(data.order, data.tokenizer.hash)), reason


def layout_record(layout: Layout) -> dict[str, int]:
    """The degrees under which random states have their owners."""
    return {"world_size": layout.world_size, "vpp": layout.vpp_size, **layout.sizes}


def train_loader(config: RunConfig, data: Data, groups: Any) -> TrainLoader:
    """Training samples of this data-parallel rank."""
    return TrainLoader(
        data.train,
        data.order,
        config=config.data,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_rank=groups.dp.rank(),
        data_parallel_size=groups.dp.size(),
    )


def step_plan(config: RunConfig, groups: Any, device: torch.device) -> StepPlan:
    """What every step of the run has in common."""
    return StepPlan(
        loss=pretrain.loss,
        learning_rate=partial(
            learning_rate, schedule=config.schedule, optimizer=config.optimizer, train_iters=config.train.train_iters
        ),
        peak_learning_rate=config.optimizer.lr,
        seq_length=config.model.seq_length,
        groups=groups,
        device=device,
    )


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


def stop_rule(config: RunConfig, stop: StopRequest) -> Callable[[int], bool]:
    """When this rank wants the run to stop before its target: a signal, a step or a duration."""
    started = time.monotonic()
    interval, minutes = config.train.exit_interval, config.train.exit_duration_in_mins

    def should_stop(step: int) -> bool:
        if stop.requested or (interval is not None and step % interval == 0):
            return True
        return minutes is not None and time.monotonic() - started >= 60.0 * minutes

    return should_stop


def writes_log(environment: RankEnvironment) -> bool:
    """The last rank ends the last pipeline stage, so it has the loss; Megatron's log comes from it too."""
    return environment.rank == environment.world_size - 1


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
