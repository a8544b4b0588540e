"""The device seam: where tensors live, and what megatron-core 0.16.1 must be told to live there.

Core names CUDA in its source. On CPU ranks (gloo) this file, and no other, replaces what core sees; on a GPU it
replaces nothing. Every replacement is one row of ``SUBSTITUTIONS`` and ``tests/unit/test_device.py`` fails when a row's
symbol has changed or its reason has gone. ``torch`` itself is left alone: core's modules get a *view* of it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_slm.errors import LaunchError
from megatron_slm.parallel.apex import refuse_without_kernels

# Imported up front so that every module that will ever run a step has been seen when the substitution is applied.
CORE_MODULES = (
    "megatron.core",
    "megatron.core.distributed",
    "megatron.core.dist_checkpointing.serialization",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.fusions.fused_bias_dropout",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.transformer.multi_token_prediction",
)


@dataclass(frozen=True)
class Substitution:
    """One replaced symbol: ``symbol`` as core spells it, why, and what it becomes on CPU ranks."""

    symbol: str
    reason: str
    becomes: str


SUBSTITUTIONS = (
    Substitution(
        "torch.compile (while core is imported)",
        "core compiles its fused ops at import, which pulls in inductor: seconds of start-up, nothing on a CPU",
        "identity; torch.compile is itself again afterwards",
    ),
    Substitution(
        "torch (the name, in every megatron.core module)",
        "44 core modules create tensors on 'cuda' or synchronise it",
        "a view: torch with the factories and torch.cuda below, all else the same objects",
    ),
    Substitution(
        "torch.{empty,zeros,ones,full,tensor,arange,empty_like,zeros_like,ones_like}(device='cuda')",
        "loss counters, norms and flags are created on 'cuda'",
        "the same factory on 'cpu'",
    ),
    Substitution("torch.cuda.current_device", "gradient, gather and receive buffers are created there", "'cpu'"),
    Substitution("torch.cuda.synchronize", "called after batched point-to-point and before saving", "nothing"),
    Substitution("torch.cuda.empty_cache", "called after freeing buffers", "nothing"),
    Substitution("torch.cuda.manual_seed", "seeds dropout", "torch.manual_seed"),
    Substitution("torch.cuda.get_rng_state", "the RNG tracker stores generator states", "torch.get_rng_state"),
    Substitution("torch.cuda.device_count", "the checkpoint writer picks a device from it", "1"),
    Substitution("torch.cuda.set_device", "the checkpoint writer selects a device", "nothing"),
    Substitution("tensor_parallel.random._get_cuda_rng_state", "reads the CUDA generator", "reads the CPU generator"),
    Substitution("tensor_parallel.random._set_cuda_rng_state", "sets the CUDA generator", "sets the CPU generator"),
    Substitution(
        "tensor_parallel.random.CudaRNGStatesTracker.fork",
        "warns whenever the CPU generator advances inside it, which here it must",
        "the same switch of states without the warning",
    ),
    Substitution(
        "'torch.cuda.*Tensor' (string constants of both optimizers)",
        "parameters are sorted by the printed name of their type",
        "names that equal the CPU types; float64 counts as a full-precision type",
    ),
    Substitution(
        "DistributedOptimizer._copy_model_grads_to_main_grads",
        "rounds gradients to fp32, which a float64 parameter refuses and a proof in float64 must not do",
        "float64 parameters take their gradient shard as it is; all others go through core's method",
    ),
    Substitution(
        "moe_utils.topk_routing_with_score_function",
        "rounds the scores of float64 logits to fp32: what differs in the 16th digit can then differ in the 8th",
        "float64 logits are scored in float64; all others go through core's function",
    ),
    Substitution(
        "get_pos_emb_on_this_cp_rank (in the three modules of rotary embeddings)",
        "its two chunk numbers are made in pinned memory and moved to the GPU",
        "parallel.context.rotary_part, the same cut by slices",
    ),
    Substitution(
        "torch.cuda.{Stream,Event,stream,current_stream}",
        "the dispatcher of a mixture of experts copies its token counts on a stream of its own",
        "objects that are always done: host code runs in order",
    ),
    Substitution(
        "token_dispatcher.maybe_move_tensor_to_cpu",
        "makes arrays of the counts only where they come from a GPU; gloo takes no tensors as split sizes",
        "the same arrays of counts that are on the host already",
    ),
    Substitution(
        "mappings._gather_along_first_dim and _reduce_scatter_along_first_dim (with split sizes)",
        "the experts' tp ranks hold different numbers of tokens; gloo gathers and scatters equal parts only",
        "sums of the whole, in which each rank has filled its part",
    ),
    Substitution(
        "Tensor.cuda() in LanguageModule.setup_embeddings_and_output_layer",
        "tied embeddings are moved before their first all-reduce",
        "Tensor.cpu()",
    ),
    Substitution(
        "Tensor.cuda() in DistributedOptimizer.get_parameter_state_dp_zero",
        "optimizer shards are moved before they are gathered for a checkpoint",
        "Tensor.cpu()",
    ),
    Substitution(
        "multi_latent_attention.HAVE_TE",
        "true without Transformer Engine too, whose classes are stand-ins then: an isinstance of one refuses them",
        "False",
    ),
)

_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "empty_like", "zeros_like", "ones_like")


class TypeName(str):
    """A printed tensor type that equals several: lets core's comparisons accept CPU tensors."""

    __slots__ = ("accepted",)
    accepted: frozenset[str]

    def __new__(cls, name: str, accepted: frozenset[str]) -> TypeName:
        self = super().__new__(cls, name)
        self.accepted = accepted
        return self

    def __eq__(self, other: object) -> bool:
        return other in self.accepted

    def __ne__(self, other: object) -> bool:
        return other not in self.accepted

    __hash__ = str.__hash__


TYPE_NAMES = {
    "torch.cuda.FloatTensor": TypeName("torch.FloatTensor", frozenset({"torch.FloatTensor", "torch.DoubleTensor"})),
    "torch.cuda.HalfTensor": TypeName("torch.HalfTensor", frozenset({"torch.HalfTensor"})),
    "torch.cuda.BFloat16Tensor": TypeName("torch.BFloat16Tensor", frozenset({"torch.BFloat16Tensor"})),
}


def choose_device(requested: str) -> str:
    """Resolve ``parallel.device``: "cuda" or "cpu".

    Raises:
        LaunchError: cuda was asked for and torch sees no GPU.
    """
    import torch

    available = torch.cuda.is_available()
    if requested == "cuda" and not available:
        raise LaunchError(
            "parallel.device=cuda, but torch sees no GPU "
            f"(torch {torch.__version__}, CUDA build {torch.version.cuda}); use parallel.device=cpu, or install a "
            "driver and a CUDA build of torch"
        )
    return "cuda" if requested != "cpu" and available else "cpu"


def default_backend(device: str) -> str:
    """Collective library of a device: nccl for cuda, gloo for cpu."""
    return "nccl" if device == "cuda" else "gloo"


def bind(device: str, local_rank: int) -> Any:
    """The ``torch.device`` of this rank; on cuda it becomes the process's current device."""
    import torch

    if device == "cuda":
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def can_free_while_sending(device: str) -> bool:
    """Whether a tensor's memory may be released while a peer still receives it.

    True on cuda, where the allocator waits for the stream. Gloo reads the memory from a thread of its own: core's early
    release of pipeline outputs then sends whatever came to lie there, and the loss is wrong without an error.
    """
    return device == "cuda"


def synchronize(device: str) -> None:
    """Wait for the device's queue, so that a clock read afterwards means something; nothing to wait for on cpu."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def device_name(device: str) -> str:
    """Marketing name of the accelerator, "cpu" without one."""
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    return "cpu"


def preload(device: str = "cpu") -> None:
    """Import torch and core and make core fit ``device``. Idempotent; starts no thread and runs no op.

    Raises:
        LaunchError: the CPU environment holds Transformer Engine or a module named apex, which change core at import;
            or on a GPU, an apex that is not NVIDIA's.
    """
    # Core warns of missing optional packages and its own deprecations; what matters of it is a line of the log.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*(ShardedTensor|`torch\.distributed\.)")
    if device == "cuda":
        refuse_without_kernels()
        for name in CORE_MODULES:
            importlib.import_module(name)
        return
    for name in ("transformer_engine", "apex"):
        if importlib.util.find_spec(name) is not None:
            raise LaunchError(
                f"the module {name!r} is importable, and core would take its CUDA-only kernels on CPU ranks; "
                f"remove it from this environment (pip uninstall {name}) or run on a GPU"
            )
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # core asks for it; without a GPU it has no effect
    with _compile_is_identity():
        for name in CORE_MODULES:
            importlib.import_module(name)
    _substitute()


@contextlib.contextmanager
def _compile_is_identity() -> Iterator[None]:
    import torch

    def identity(model: Any = None, **_: Any) -> Any:
        return model if model is not None else identity

    original = torch.compile
    torch.compile = identity
    try:
        yield
    finally:
        torch.compile = original


def _substitute() -> None:
    """Apply ``SUBSTITUTIONS`` to the core modules imported so far."""
    import torch
    from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding, yarn_rotary_pos_embedding
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    from megatron_slm.parallel import stand_ins
    from megatron_slm.parallel.context import rotary_part

    view = cpu_view_of_torch()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = view  # type: ignore[attr-defined]
    random._get_cuda_rng_state = stand_ins.get_rng_state
    random._set_cuda_rng_state = stand_ins.set_rng_state
    random.CudaRNGStatesTracker.fork = stand_ins.fork
    for function in (
        DistributedOptimizer.__init__,
        DistributedOptimizer._build_model_and_main_param_groups,
        Float16OptimizerWithFloat16Params.__init__,
        clip_grads.clip_grad_by_total_norm_fp32,
    ):
        _rename_types(function)
    DistributedOptimizer._copy_model_grads_to_main_grads = stand_ins.keep_float64_gradients(
        DistributedOptimizer._copy_model_grads_to_main_grads
    )
    for function in (
        LanguageModule.setup_embeddings_and_output_layer,
        DistributedOptimizer.get_parameter_state_dp_zero,
    ):
        _call_cpu_instead_of_cuda(function)
    for embedding in (rope_utils, rotary_pos_embedding, yarn_rotary_pos_embedding):
        embedding.get_pos_emb_on_this_cp_rank = rotary_part
    multi_latent_attention.HAVE_TE = False
    moe_utils.topk_routing_with_score_function = stand_ins.keep_float64_scores(
        moe_utils.topk_routing_with_score_function
    )
    token_dispatcher.maybe_move_tensor_to_cpu = stand_ins.counts_as_array
    mappings._gather_along_first_dim = stand_ins.uneven_gather(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = stand_ins.uneven_scatter(mappings._reduce_scatter_along_first_dim)


def cpu_view_of_torch() -> types.ModuleType:
    """A module with torch's own objects, except that what core creates on 'cuda' is created on 'cpu'."""
    import torch

    from megatron_slm.parallel.stand_ins import HostStream

    cuda = types.ModuleType("torch.cuda")
    cuda.__dict__.update(torch.cuda.__dict__)
    cuda.__dict__.update(
        current_device=lambda: "cpu",
        synchronize=lambda device=None: None,
        empty_cache=lambda: None,
        manual_seed=torch.manual_seed,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        device_count=lambda: 1,
        set_device=lambda device: None,
        Stream=HostStream,
        Event=HostStream,
        current_stream=HostStream,
        stream=lambda stream: contextlib.nullcontext(),
    )
    view = types.ModuleType("torch")
    view.__dict__.update(torch.__dict__)
    # Sub-modules that torch loads on first use are looked up there when the view does not have them yet.
    view.__dict__["__getattr__"] = lambda name: getattr(torch, name)
    view.__dict__["cuda"] = cuda
    for name in _FACTORIES:
        view.__dict__[name] = _on_cpu(getattr(torch, name))
    return view


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def create(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = "cpu"
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _call_cpu_instead_of_cuda(function: Any) -> None:
    """Rename the attribute ``cuda`` in one function; ``torch.cpu.current_device()`` exists too and is "cpu"."""
    names = function.__code__.co_names
    function.__code__ = function.__code__.replace(co_names=tuple("cpu" if name == "cuda" else name for name in names))


def _rename_types(function: Any) -> None:
    """Replace core's tensor-type strings among a function's constants (they stand alone or in tuples)."""

    def rename(constant: Any) -> Any:
        if isinstance(constant, tuple):
            return tuple(rename(part) for part in constant)
        if isinstance(constant, str) and not isinstance(constant, TypeName):
            return TYPE_NAMES.get(constant, constant)
        return constant

    function = getattr(function, "__func__", function)
    code = function.__code__
    function.__code__ = code.replace(co_consts=tuple(rename(constant) for constant in code.co_consts))


@contextlib.contextmanager
def storage_resizes(tell: Callable[[Any], None]) -> Iterator[None]:
    """``tell`` hears of every storage that is given another size; torch dispatches nothing then."""
    import torch

    storages: Any = torch.UntypedStorage
    resize = storages.resize_

    def told(storage: Any, size: int) -> Any:
        resized = resize(storage, size)
        tell(storage)
        return resized

    storages.resize_ = told
    try:
        yield
    finally:
        storages.resize_ = resize
