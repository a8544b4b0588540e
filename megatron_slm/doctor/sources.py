"""Every known source of nondeterminism, and whether it is active in a job. Read off its configuration: no op runs.

What can differ from run to run is a source. What only differs from one layout, machine or version to another is no
source but a term of the contract (``doctor/determinism.py``). Lines of megatron-core are those of 0.16.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_slm.config.run_config import RunConfig

PROGRAM = "train.deterministic=true"
CUBLAS_WORKSPACES = (":4096:8", ":16:8")
"""The values under which torch takes cuBLAS to be deterministic."""


class State(StrEnum):
    """What a source is in a job."""

    ACTIVE = "active"
    FIXED = "fixed"
    INACTIVE = "inactive"


class Verdict(NamedTuple):
    """The state of a source in a job, the reason, and for an active one what to set."""

    state: State
    reason: str
    switch: str = ""


@dataclass(frozen=True)
class Target:
    """A job: what it is configured to do, where, and under which variables."""

    config: RunConfig
    device: str
    """``cuda`` or ``cpu``."""
    world_size: int
    core: TransformerConfig
    environment: Mapping[str, str]
    transformer_engine: bool
    """Whether the layers are Transformer Engine's."""

    @property
    def deterministic(self) -> bool:
        """Whether the program has torch take deterministic algorithms alone."""
        return self.config.train.deterministic

    @property
    def threads(self) -> int | None:
        """Compute threads of a rank; None where no variable says."""
        text = self.environment.get("OMP_NUM_THREADS", "")
        return int(text) if text.isdecimal() and int(text) > 0 else None

    @property
    def backend(self) -> str:
        """Collective library."""
        return self.config.parallel.distributed_backend or ("nccl" if self.device == "cuda" else "gloo")


@dataclass(frozen=True)
class Kind:
    """A source as it is in every job."""

    name: str
    where: str
    """File, and line where there is one: of megatron-core where the path begins so, else of the library named."""
    why: str
    judge: Callable[[Target], Verdict]


def embedding_gradient(target: Target) -> Verdict:
    """Core has two ways to look tokens up; the good one on a GPU is the bad one on a CPU with several threads."""
    if target.device == "cuda":
        return _by_program(target, "core's deterministic_mode is on together with torch's")
    if not target.core.deterministic_mode:
        return Verdict(State.INACTIVE, "CPU ranks look up by F.embedding, whose gradient has one order")
    if target.threads == 1:
        return Verdict(State.INACTIVE, "one thread adds in one order")
    return _by_program(target, "the indexing of core's deterministic_mode, with torch's switch on")


def unpermuted_tokens(target: Target) -> Verdict:
    """Only a GPU adds a token's experts by atomics."""
    return _of_experts(target, "core takes index_add instead")


def routing_map(target: Target) -> Verdict:
    """Only a GPU scatters in no order."""
    return _of_experts(target, "core takes index_put instead")


def router_ties(target: Target) -> Verdict:
    """Coarse or jittered scores tie, or fall differently."""
    core = target.core
    if core.num_moe_experts is None:
        return _dense()
    if core.moe_input_jitter_eps is not None:
        return Verdict(State.ACTIVE, "the router's input is jittered", _core_switch("moe_input_jitter_eps", None))
    if core.moe_router_dtype not in ("fp32", "fp64"):
        why = f"the router scores in {core.moe_router_dtype or core.params_dtype}, in which many are equal"
        return Verdict(State.ACTIVE, why, _core_switch("moe_router_dtype", "fp32"))
    return Verdict(State.FIXED, f"scores are {core.moe_router_dtype} without jitter (model/core_config.py)")


def attention_gradient(target: Target) -> Verdict:
    """Fused attention adds the gradient of queries by atomics, unless it is told not to."""
    name = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"
    if target.device == "cpu":
        return Verdict(State.INACTIVE, "torch's attention on the CPU has one order")
    if not target.transformer_engine or target.config.data.reset_attention_mask:
        anything = "torch's attention (parallel/attention.py) takes any backward"
        return _by_program(target, "torch's attention takes its deterministic backward", anything)
    if target.environment.get(name) == "0":
        return Verdict(State.FIXED, f"{name}=0")
    return Verdict(State.ACTIVE, f"attention is Transformer Engine's, and {_shown(target, name)}", f"{name}=0")


def matrix_workspace(target: Target) -> Verdict:
    """Streams that share cuBLAS's workspace choose kernels by what is free."""
    name = "CUBLAS_WORKSPACE_CONFIG"
    if target.device == "cpu":
        return Verdict(State.INACTIVE, "no cuBLAS on CPU ranks")
    if target.environment.get(name) in CUBLAS_WORKSPACES:
        return Verdict(State.FIXED, f"{name}={target.environment[name]}")
    return Verdict(State.ACTIVE, _shown(target, name), f"{name}={CUBLAS_WORKSPACES[0]}")


def reduction_order(target: Target) -> Verdict:
    """NCCL measures and chooses; gloo's ring is a function of the message's size."""
    name = "NCCL_ALGO"
    if target.world_size == 1:
        return Verdict(State.INACTIVE, "one rank reduces nothing")
    if target.backend == "gloo":
        return Verdict(State.INACTIVE, "gloo adds in an order that the bucket layout alone decides")
    if target.environment.get(name, "").lower() == "ring":
        return Verdict(State.FIXED, f"{name}={target.environment[name]}")
    return Verdict(State.ACTIVE, _shown(target, name), f"{name}=Ring")


def compiled_fusions(target: Target) -> Verdict:
    """torch.compile times candidates and keeps the fastest."""
    name = "TORCHINDUCTOR_DETERMINISTIC"
    if target.device == "cpu":
        return Verdict(State.INACTIVE, "nothing is compiled on CPU ranks (parallel/device.py)")
    if target.environment.get(name) == "1":
        return Verdict(State.FIXED, f"{name}=1")
    return Verdict(State.ACTIVE, _shown(target, name), f"{name}=1")


def compute_threads(target: Target) -> Verdict:
    """The launcher or the machine's cores decide where no variable does."""
    name = "OMP_NUM_THREADS"
    if target.device == "cuda":
        return Verdict(State.INACTIVE, "values are computed on the GPU")
    if target.threads is None:
        return Verdict(State.ACTIVE, f"{_shown(target, name)}, so the machine's cores decide", f"{name}=1")
    return Verdict(State.FIXED, f"{name}={target.threads}")


def core_option(option: str) -> Callable[[Target], Verdict]:
    """The judge of an option of core that no key of ours sets."""

    def judge(target: Target) -> Verdict:
        if getattr(target.core, option):
            return Verdict(State.ACTIVE, f"core's {option} is on", _core_switch(option, False))
        return Verdict(State.INACTIVE, f"core's {option} is off")

    return judge


KINDS = (
    Kind(
        "embedding gradient",
        "megatron/core/tensor_parallel/layers.py:283",
        "the gradients of a token that occurs often are added in no fixed order",
        embedding_gradient,
    ),
    Kind(
        "tokens back from experts",
        "megatron/core/transformer/moe/moe_utils.py:453",
        "scatter_add on a GPU adds the outputs of a token's experts in no fixed order",
        unpermuted_tokens,
    ),
    Kind(
        "routing map",
        "megatron/core/transformer/moe/moe_utils.py:731",
        "scatter on a GPU writes the experts' weights in no fixed order",
        routing_map,
    ),
    Kind(
        "ties in the router",
        "megatron/core/transformer/moe/moe_utils.py:697",
        "topk does not say which of two equal scores it takes",
        router_ties,
    ),
    Kind(
        "attention gradient",
        "megatron/core/extensions/transformer_engine.py:1254",
        "fused backward kernels on a GPU add the gradient of the queries by atomics",
        attention_gradient,
    ),
    Kind(
        "matrix products",
        "cuBLAS, in every linear layer",
        "with more than one stream cuBLAS picks a kernel by the workspace that is free",
        matrix_workspace,
    ),
    Kind(
        "order of reductions",
        "megatron/core/distributed/param_and_grad_buffer.py:364",
        "NCCL chooses algorithm and channels by topology and size, and each adds ranks in another order",
        reduction_order,
    ),
    Kind(
        "compiled fusions",
        "megatron/core/jit.py:16",
        "torch.compile keeps the candidate that was fastest when it was timed",
        compiled_fusions,
    ),
    Kind(
        "compute threads",
        "torch, intra-op threads",
        "the sum over tokens in a norm's weight gradient is divided over the threads",
        compute_threads,
    ),
    Kind(
        "fused weight gradient",
        "megatron/core/tensor_parallel/layers.py:561",
        "the product is added to the gradient buffer inside the kernel, with another rounding",
        core_option("gradient_accumulation_fusion"),
    ),
    Kind(
        "fused cross entropy",
        "megatron/core/models/common/language_module/language_module.py:140",
        "upstream refuses the fused loss in its deterministic mode",
        core_option("cross_entropy_loss_fusion"),
    ),
    Kind(
        "tp overlap by user buffers",
        "megatron/core/extensions/transformer_engine.py:532",
        "upstream refuses the overlapped products in its deterministic mode",
        core_option("tp_comm_overlap"),
    ),
    Kind(
        "fused permutation of tokens",
        "megatron/core/transformer/moe/moe_utils.py:28",
        "Transformer Engine's permutation kernels are not shown to add in one order",
        core_option("moe_permute_fusion"),
    ),
    Kind(
        "overlap of shared experts",
        "megatron/core/transformer/transformer_config.py:540",
        "the gradients of router and shared expert are added in another order",
        core_option("moe_shared_expert_overlap"),
    ),
)


def _by_program(target: Target, fixed: str, otherwise: str = "torch takes any algorithm") -> Verdict:
    """What torch's deterministic algorithms settle."""
    if target.deterministic:
        return Verdict(State.FIXED, f"{PROGRAM}: {fixed}")
    return Verdict(State.ACTIVE, otherwise, PROGRAM)


def _of_experts(target: Target, fixed: str) -> Verdict:
    if target.core.num_moe_experts is None:
        return _dense()
    if target.device == "cpu":
        return Verdict(State.INACTIVE, "one order on CPU ranks")
    return _by_program(target, fixed)


def _dense() -> Verdict:
    return Verdict(State.INACTIVE, "the model has no experts")


def _core_switch(option: str, value: object) -> str:
    return f"{option}={value} in megatron_slm/model/core_config.py"


def _shown(target: Target, name: str) -> str:
    """The variable as it is."""
    value = target.environment.get(name)
    return f"{name} is not set" if value is None else f"{name}={value}"
