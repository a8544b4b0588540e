"""How the model is trained: the loop, precision, optimizer, schedule, checkpoint and log sections."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.option import option


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Batch, length, seed and what is recomputed in the backward pass."""

    micro_batch_size: int = option(1, "samples one rank passes through the model at once", minimum=1)
    global_batch_size: int = option(8, "samples of one optimizer step, over all ranks", minimum=1)
    train_iters: int = option(100, "optimizer steps of the whole run", minimum=0)
    seed: int = option(1234, "seed of initialisation, dropout and (by default) sample order", minimum=0)
    deterministic: bool = option(
        False,
        "take deterministic algorithms alone, and refuse to start while anything is active that "
        "mslm doctor determinism lists",
        flag="deterministic-mode",
    )
    eval_interval: int | None = option(None, "steps between validations; default only at the end", minimum=1)
    eval_iters: int = option(
        8, "global batches of one validation, the same samples each time; 0 switches it off", minimum=0
    )
    exit_interval: int | None = option(
        None, "save and stop, exit code 75, when the step is a multiple of this", minimum=1
    )
    exit_duration_in_mins: float | None = option(
        None, "save and stop, exit code 75, after this many minutes", minimum=0.0
    )
    recompute_granularity: str | None = option(
        None,
        "recompute activations in the backward pass: whole layers, or chosen modules",
        choices=("full", "selective"),
    )
    recompute_method: str | None = option(
        None, "which layers recompute_granularity=full takes", choices=("uniform", "block")
    )
    recompute_num_layers: int | None = option(
        None, "layers of one recomputed unit (uniform) or of each chunk (block)", minimum=1
    )
    recompute_modules: tuple[str, ...] = option(("core_attn",), "modules recompute_granularity=selective takes")
    rampup_batch_size: tuple[str, ...] = option(
        (), "batch ramp-up START,INCREMENT,SAMPLES: grows from START to global_batch_size over so many samples"
    )
    early_stopping_patience: int | None = option(
        None, "validations without a new best held-out loss after which the run ends", minimum=1
    )
    z_loss_coefficient: float = option(0.0, "times the mean squared log-partition, added to the loss", minimum=0.0)
    label_smoothing: float = option(0.0, "probability spread evenly over the vocabulary", minimum=0.0, below=1.0)
    ema_decay: float | None = option(
        None, "keep an exponential moving average of the weights with this decay", above=0.0, below=1.0
    )
    non_finite_policy: str = option(
        "stop",
        "at a loss or gradient that is not finite, once its origin is named",
        choices=("stop", "skip", "rollback"),
    )
    spike_policy: str = option(
        "warn", "at a spike of loss or gradient norm", choices=("off", "warn", "stop", "skip", "rollback")
    )
    spike_threshold: float = option(
        6.0, "a spike is this many robust standard deviations above the median of spike_window steps", above=0.0
    )
    spike_window: int = option(64, "steps a spike is judged by; none is found before they are full", minimum=8)
    max_interventions: int = option(10, "skipped batches and roll-backs of a run, after which it stops", minimum=0)


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats. Without an option here, parameters and compute are fp32."""

    bf16: bool = option(False, "parameters and compute in bfloat16, master weights and moments in fp32")
    fp64: bool = option(False, "parameters, compute and moments in float64: for proofs, not for training")
    accumulate_allreduce_grads_in_fp32: bool = option(True, "gradient buffers and their reduction in fp32 with bf16")
    fp8: str | None = option(
        None,
        "linear layers multiply in FP8 (Transformer Engine, on a GPU): hybrid has gradients in E5M2, the rest in E4M3",
        choices=("hybrid", "e4m3"),
        flag="fp8-format",
    )
    fp8_recipe: str = option(
        "delayed",
        "what shares a scale: a tensor (delayed: by earlier steps; tensorwise: by itself), 128 elements or 128 x 128 "
        "of a weight (blockwise), 32 elements (mxfp8, Blackwell)",
        choices=("delayed", "tensorwise", "blockwise", "mxfp8"),
    )
    fp8_param_gather: bool = option(False, "weights of linear layers are kept and gathered in FP8 alone")

    @property
    def params_dtype(self) -> str:
        """Name of the torch dtype of parameters and activations."""
        return "bfloat16" if self.bf16 else "float64" if self.fp64 else "float32"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), through core's optimizer."""

    lr: float = option(3e-4, "peak learning rate", minimum=0.0)
    min_lr: float = option(0.0, "learning rate at the end of the decay", minimum=0.0)
    weight_decay: float = option(
        0.1, "decoupled decay of matrices; norms, biases and embeddings' 1-D parameters have none", minimum=0.0
    )
    adam_beta1: float = option(0.9, "decay of the first moment", minimum=0.0, maximum=1.0)
    adam_beta2: float = option(0.95, "decay of the second moment", minimum=0.0, maximum=1.0)
    adam_eps: float = option(1e-8, "added to the root of the second moment", above=0.0)
    clip_grad: float = option(1.0, "largest global gradient norm; 0 switches clipping off", minimum=0.0)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate as a pure function of the step."""

    lr_decay_style: str = option(
        "cosine", "shape after warm-up", choices=("constant", "linear", "cosine", "inverse-square-root", "WSD")
    )
    lr_warmup_iters: int = option(0, "steps of linear warm-up from 0", minimum=0)
    lr_decay_iters: int | None = option(None, "step at which min_lr is reached; default train.train_iters", minimum=1)
    lr_wsd_decay_style: str = option(
        "exponential", "shape of WSD's last part", choices=("linear", "cosine", "exponential", "minus_sqrt")
    )
    lr_wsd_decay_iters: int | None = option(None, "steps of WSD's last part", minimum=1)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is written for a resume, and what a new run starts from."""

    save_interval: int | None = option(None, "steps between checkpoints; default only at the end", minimum=1)
    async_save: bool = option(False, "write checkpoints in the background while training goes on")
    keep_last: int | None = option(None, "checkpoints kept, the newest ones; default all", minimum=1)
    save_retain_interval: int | None = option(
        None, "checkpoints of steps that are a multiple of this are kept beside keep_last", minimum=1
    )
    pretrained_checkpoint: str | None = option(
        None, "another run's checkpoint directory: start from its weights alone, with a new optimizer at step 0"
    )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run says while it runs."""

    runs_dir: str = option("runs", "directory that holds every run's directory")
    log_interval: int = option(10, "steps between console lines", minimum=1)
    layer_norms_interval: int | None = option(
        None, "steps between norms of gradients, updates and activations of every layer", minimum=1
    )
    noise_scale_interval: int | None = option(
        None, "steps between measurements of the gradient noise scale; each costs a micro-batch", minimum=1
    )
    memory_ledger: bool = option(
        False, "measure the memory of one early step and write it, beside the prediction, into the run's memory/"
    )
    straggler_interval: int | None = option(
        50,
        "steps between comparisons of how busy the ranks are; one that is slow is named; none switches it off",
        minimum=1,
    )
    telemetry: bool | None = option(
        None,
        "power, energy, clocks, temperature and errors of all ranks' GPUs with each console line; default: on GPUs",
    )
    prometheus_port: int | None = option(
        None, "metrics for Prometheus over HTTP, on the machine of the last rank", minimum=1, maximum=65535
    )
    prometheus_address: str = option("127.0.0.1", "address that prometheus_port listens at; 0.0.0.0 is every one")
    prometheus_file: str | None = option(None, "metrics for Prometheus in a file of node_exporter's textfile collector")
    tensorboard: bool = option(True, "write TensorBoard events into the run's directory")
    progress_bar: bool = option(True, "show a progress bar when standard error is a terminal")
