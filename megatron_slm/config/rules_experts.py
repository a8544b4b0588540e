"""Rules about mixtures of experts: what core 0.16.1 asserts while it builds, ignores, or gets wrong."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_slm.config.facts import Facts, nearest_divisors
from megatron_slm.parallel.layout import nearest_multiples

EXPERTS = "model.num_moe_experts"
TOPK = "model.moe_router_topk"
SCORES = "model.moe_router_score_function"
SHARED = "model.moe_shared_expert_intermediate_size"
BALANCING, AUX = "model.moe_router_load_balancing_type", "model.moe_aux_loss_coeff"
EP, ETP = "parallel.expert_model_parallel_size", "parallel.expert_tensor_parallel_size"
TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
GROUPED_GEMM = "parallel.moe_grouped_gemm"

_EXPERTS_ONLY = (
    "model.moe_layer_freq",
    "model.moe_first_dense_layers",
    "model.moe_ffn_hidden_size",
    TOPK,
    SCORES,
    "model.moe_router_pre_softmax",
    "model.moe_router_num_groups",
    "model.moe_router_group_topk",
    "model.moe_router_topk_scaling_factor",
    "model.moe_router_enable_expert_bias",
    "model.moe_router_bias_update_rate",
    BALANCING,
    AUX,
    "model.moe_z_loss_coeff",
    SHARED,
    "model.moe_shared_expert_gate",
    "model.moe_expert_capacity_factor",
    "model.moe_token_drop_policy",
    EP,
    ETP,
    "parallel.moe_token_dispatcher_type",
    GROUPED_GEMM,
)


def expert_options(facts: Facts) -> Iterator[str]:
    """The options of experts belong to a model with experts, and such a model has a layer of them."""
    model = facts.config.model
    if model.num_moe_experts is None:
        if given := [key for key in _EXPERTS_ONLY if facts.is_set(key)]:
            yield (
                f"{facts.cite(*given)}, but {facts.cite(EXPERTS)}: a dense model has no experts, and would ignore "
                f"what is said of them. Set {EXPERTS}, or leave them out."
            )
    elif not any(model.is_moe_layer(layer) for layer in range(model.num_layers)):
        keys = ("model.moe_first_dense_layers", "model.moe_layer_freq", "model.num_layers")
        yield f"{facts.cite(*keys)}: no layer is left for the experts. Lower the first two, or raise model.num_layers."


def expert_division(facts: Facts) -> Iterator[str]:
    """Experts divide over ep, their matrices over etp, the shared expert over tp, and the ranks over all of it."""
    model, parallel = facts.config.model, facts.config.parallel
    if model.num_moe_experts is None:
        return
    ep, etp, pp = parallel.expert_model_parallel_size, parallel.expert_tp_size, parallel.pipeline_model_parallel_size
    if model.num_moe_experts % ep:
        yield (
            f"{facts.cite(EXPERTS, EP)}: every rank of ep must hold equally many experts. "
            f"{nearest_divisors(EP, model.num_moe_experts, ep)} {nearest_multiples(EXPERTS, model.num_moe_experts, ep)}"
        )
    if model.expert_ffn_size % etp:
        yield (
            f"{facts.cite('model.moe_ffn_hidden_size', ETP, TP)}: the {model.expert_ffn_size} inner channels of an "
            f"expert must divide evenly over its {etp} ranks. {nearest_divisors(ETP, model.expert_ffn_size, etp)}"
        )
    if facts.world_size % (etp * ep * pp):
        yield (
            f"world size {facts.world_size} with {facts.cite(ETP, TP, EP, PP)}: the ranks must be a multiple of "
            f"expert tp x ep x pp = {etp} x {ep} x {pp} = {etp * ep * pp}, which hold every expert once. "
            f"{nearest_multiples('world size', facts.world_size, etp * ep * pp)}"
        )
    tp, shared = parallel.tensor_model_parallel_size, model.moe_shared_expert_intermediate_size
    if shared is not None and shared % tp:
        yield (
            f"{facts.cite(SHARED, TP)}: the shared expert must divide evenly over tp. "
            f"{nearest_multiples(SHARED, shared, tp)} {nearest_divisors(TP, shared, tp)}"
        )


def expert_tensor_parallel(facts: Facts) -> Iterator[str]:
    """Core's experts want each tp rank to send its own tokens."""
    parallel = facts.config.parallel
    if facts.config.model.num_moe_experts is None or parallel.tensor_model_parallel_size == 1:
        return
    if not parallel.sequence_parallel:
        key = "parallel.sequence_parallel"
        yield (
            f"{facts.cite(EXPERTS, TP, key)}: without sequence parallelism every tp rank would send the same tokens to "
            f"the experts, and core refuses to train. Set {key}=true, or {TP}=1."
        )


def router_choice(facts: Facts) -> Iterator[str]:
    """A token is sent to experts that exist, by weights that have a gradient."""
    model = facts.config.model
    experts, topk, pre = model.num_moe_experts, model.moe_router_topk, "model.moe_router_pre_softmax"
    if experts is None:
        return
    if topk > experts:
        yield f"{facts.cite(TOPK, EXPERTS)}: a token cannot be sent to more experts than there are. Lower the former."
    if model.moe_router_score_function == "softmax" and topk == 1 and not model.moe_router_pre_softmax:
        yield (
            f"{facts.cite(TOPK, pre)}: the softmax of one chosen logit is 1, so the router would learn nothing. Set "
            f"{pre}=true, or raise {TOPK}."
        )
    if model.moe_router_score_function != "softmax" and model.moe_router_pre_softmax:
        yield f"{facts.cite(pre, SCORES)}: there is no softmax. Leave the former out, or set {SCORES}=softmax."


def router_groups(facts: Facts) -> Iterator[str]:
    """Group-limited routing: core scores a group by its topk / group_topk best experts."""
    model = facts.config.model
    experts, topk = model.num_moe_experts, model.moe_router_topk
    groups, chosen = "model.moe_router_num_groups", "model.moe_router_group_topk"
    number, kept = model.moe_router_num_groups, model.moe_router_group_topk
    if experts is None or (number is None and kept is None):
        return
    if number is None or kept is None:
        yield f"{facts.cite(groups, chosen)} need each other. Set both, or leave both out."
        return
    if experts % number:
        yield (
            f"{facts.cite(EXPERTS, groups)}: all groups must have equally many experts. "
            f"{nearest_divisors(groups, experts, number)}"
        )
        return
    size = experts // number
    if kept > number:
        yield f"{facts.cite(chosen, groups)}: there are not so many groups. Largest valid {chosen}: {number}."
    elif topk % kept or not topk // kept <= size:
        yield (
            f"{facts.cite(TOPK, chosen)}: a group is judged by its {TOPK} / {chosen} best experts, which must be a "
            f"whole number of its {size} experts. {nearest_divisors(chosen, topk, kept)}"
        )


def balancing(facts: Facts) -> Iterator[str]:
    """What keeps the experts' loads alike is complete."""
    model = facts.config.model
    bias, rate = "model.moe_router_enable_expert_bias", "model.moe_router_bias_update_rate"
    if model.num_moe_experts is None:
        return
    if model.moe_aux_loss_coeff and model.moe_router_load_balancing_type == "none":
        yield (
            f"{facts.cite(AUX, BALANCING)}: there is no balancing loss that the coefficient could weigh. Set "
            f"{BALANCING}=aux_loss or seq_aux_loss, or leave {AUX} out."
        )
    if model.moe_router_load_balancing_type != "none" and not model.moe_aux_loss_coeff:
        yield (
            f"{facts.cite(BALANCING, AUX)}: the loss would have no weight. Set {AUX} (1e-2 is usual), or "
            f"{BALANCING}=none."
        )
    if model.moe_router_enable_expert_bias and model.moe_router_score_function != "sigmoid":
        yield (
            f"{facts.cite(bias, SCORES)}: the bias is added to scores between 0 and 1, and core has it for sigmoids "
            f"alone. Set {SCORES}=sigmoid, or {bias}=false."
        )
    if facts.is_set(rate) and not model.moe_router_enable_expert_bias:
        yield f"{facts.cite(rate, bias)}: there is no bias to move. Leave the former out, or set {bias}=true."


def expert_parts(facts: Facts) -> Iterator[str]:
    """Options that need another part of the layer, and biases, which experts have none of."""
    model = facts.config.model
    if model.num_moe_experts is None:
        return
    gate, biases = "model.moe_shared_expert_gate", "model.add_bias_linear"
    capacity, policy = "model.moe_expert_capacity_factor", "model.moe_token_drop_policy"
    if model.moe_shared_expert_gate and model.moe_shared_expert_intermediate_size is None:
        yield f"{facts.cite(gate, SHARED)}: there is no shared expert to gate. Set {SHARED}, or leave {gate} out."
    if facts.is_set(policy) and model.moe_expert_capacity_factor is None:
        yield f"{facts.cite(policy, capacity)}: no token is dropped. Set {capacity}, or leave {policy} out."
    if model.add_bias_linear:
        yield (
            f"{facts.cite(biases, EXPERTS)}: core 0.16.1 adds up the gradients of an expert's output bias over tp "
            f"ranks that hold different experts, and has no biases in shared experts. Set {biases}=false."
        )


def grouped_gemm(facts: Facts) -> Iterator[str]:
    """One kernel for all experts of a rank needs Transformer Engine, and layouts in which core counts its gradients."""
    parallel = facts.config.parallel
    if not parallel.moe_grouped_gemm or facts.config.model.num_moe_experts is None:
        return
    if parallel.device == "cpu":
        yield (
            f"{facts.cite(GROUPED_GEMM, 'parallel.device')}: the kernel is Transformer Engine's and needs a GPU. Set "
            f"{GROUPED_GEMM}=false, or parallel.device=cuda."
        )
    if parallel.expert_model_parallel_size > 1 and parallel.tensor_model_parallel_size > 1:
        yield (
            f"{facts.cite(GROUPED_GEMM, EP, TP)}: core 0.16.1 leaves the gradients of grouped experts out of the "
            "gradient norm on every tp rank but the first, and clips wrongly (Megatron-LM PR 5916). Set "
            f"{GROUPED_GEMM}=false, or one of the degrees to 1."
        )


def expert_recompute(facts: Facts) -> Iterator[str]:
    """Experts are recomputed where there are experts."""
    train, modules = facts.config.train, "train.recompute_modules"
    if train.recompute_granularity != "selective":
        return
    for module, key in (("moe", EXPERTS), ("shared_experts", SHARED)):
        if module in train.recompute_modules and facts.value(key) is None:
            yield f"{facts.cite(modules, key)}: {module} is a part of the latter. Leave it out, or set {key}."


RULES = (
    expert_options,
    expert_division,
    expert_tensor_parallel,
    router_choice,
    router_groups,
    balancing,
    expert_parts,
    grouped_gemm,
    expert_recompute,
)
