"""Rules about precision, recomputation, the optimizer and its schedule."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_slm.config.facts import Facts
from megatron_slm.errors import ConfigError
from megatron_slm.parallel.layout import layer_split

_RECOMPUTABLE = ("core_attn", "mlp", "mla_up_proj", "moe", "shared_experts")
_ELSEWHERE_RECOMPUTABLE = {
    "layernorm": "core writes that path for Transformer Engine's layers, and this version builds without it",
    "moe_act": "core recomputes it inside Transformer Engine's grouped experts alone; recompute moe",
}
"""Modules that megatron-core 0.16.1 can recompute and this version cannot, with the reason."""


def precision(facts: Facts) -> Iterator[str]:
    """A run has one number format, and its options belong to it."""
    own = facts.config.precision
    bf16, fp64, in_fp32 = "precision.bf16", "precision.fp64", "precision.accumulate_allreduce_grads_in_fp32"
    if own.bf16 and own.fp64:
        yield f"{facts.cite(bf16, fp64)} exclude each other. Set one of them to false."
    if own.fp64 and facts.config.parallel.device == "cuda":
        yield (
            f"{facts.cite(fp64, 'parallel.device')}: float64 is built for ranks on the CPU alone. Set "
            f"parallel.device=cpu, or {fp64}=false."
        )
    if not own.bf16 and facts.is_set(in_fp32):
        yield (
            f"{facts.cite(in_fp32, bf16)}: gradients have the parameters' format without bf16, so the former would be "
            f"ignored. Leave it out, or set {bf16}=true."
        )


def recompute_options(facts: Facts) -> Iterator[str]:
    """The options that go with each granularity of recomputation, as core demands them."""
    train = facts.config.train
    granularity, method, layers = "train.recompute_granularity", "train.recompute_method", "train.recompute_num_layers"
    if train.recompute_granularity == "full":
        for key, value in ((method, train.recompute_method), (layers, train.recompute_num_layers)):
            if value is None:
                yield (
                    f"{facts.cite(granularity, key)}: recomputing whole layers needs both {method} (uniform or block) "
                    "and "
                    f"{layers} (1 or more)."
                )
    else:
        for key in (method, layers):
            if facts.is_set(key):
                yield (
                    f"{facts.cite(key, granularity)}: the former belongs to recompute_granularity=full and would be "
                    f"ignored. Leave it out, or set {granularity}=full."
                )
    if train.recompute_granularity != "selective" and facts.is_set("train.recompute_modules"):
        yield (
            f"{facts.cite('train.recompute_modules', granularity)}: the modules belong to "
            "recompute_granularity=selective "
            f"and would be ignored. Leave them out, or set {granularity}=selective."
        )


def recompute_modules(facts: Facts) -> Iterator[str]:
    """Selective recomputation takes modules that this version builds."""
    train = facts.config.train
    if train.recompute_granularity != "selective":
        return
    cited = facts.cite("train.recompute_modules")
    if not train.recompute_modules:
        yield f"{cited}: selective recomputation needs at least one module: {' or '.join(_RECOMPUTABLE)}."
    for module in train.recompute_modules:
        if module not in _RECOMPUTABLE:
            reason = _ELSEWHERE_RECOMPUTABLE.get(module, "there is no such module")
            yield (
                f"{cited}: {module} cannot be recomputed: {reason}. The valid modules are "
                f"{' and '.join(_RECOMPUTABLE)}."
            )


def recompute_biases(facts: Facts) -> Iterator[str]:
    """A recomputed MLP has no biases: core 0.16.1 lets its bias out of the recomputed part, and backward never ends."""
    train, modules, biases = facts.config.train, "train.recompute_modules", "model.add_bias_linear"
    if train.recompute_granularity == "selective" and "mlp" in train.recompute_modules and facts.value(biases):
        yield (
            f"{facts.cite(modules, biases)}: core 0.16.1 returns the bias itself from the recomputed MLP, whose "
            f"backward pass then calls itself without end. Leave mlp out of the former, set {biases}=false, or set "
            "train.recompute_granularity=full."
        )


def recompute_bounds(facts: Facts) -> Iterator[str]:
    """The recomputed units fit every chunk of layers: core would run past the end, or quietly take fewer."""
    train, parallel = facts.config.train, facts.config.parallel
    unit = train.recompute_num_layers
    if train.recompute_granularity != "full" or unit is None or train.recompute_method is None:
        return
    try:
        split = layer_split(facts.config.model.num_layers, parallel)
    except ConfigError:
        return  # the rule on the pipeline speaks already
    sizes = sorted({layers for stage in split for layers in stage if layers})
    cited = facts.cite("train.recompute_num_layers", "train.recompute_method")
    held = " or ".join(map(str, sizes))
    if train.recompute_method == "uniform" and any(size % unit for size in sizes):
        valid = [str(size) for size in range(1, sizes[0] + 1) if all(other % size == 0 for other in sizes)]
        yield f"{cited}: chunks hold {held} layers, which must be whole units. Valid values: {', '.join(valid)}."
    if train.recompute_method == "block" and unit > sizes[-1]:
        yield f"{cited}: chunks hold {held} layers, and more cannot be recomputed. Largest valid value: {sizes[-1]}."


def validation(facts: Facts) -> Iterator[str]:
    """An interval of validations means something where there are validations."""
    interval, batches = "train.eval_interval", "train.eval_iters"
    if facts.config.train.eval_iters == 0 and facts.is_set(interval):
        yield (
            f"{facts.cite(interval, batches)}: no batches switch validation off, so the interval would be ignored. "
            f"Leave {interval} out, or set {batches} to at least 1."
        )


def roll_back(facts: Facts) -> Iterator[str]:
    """A roll-back needs checkpoints to go back to."""
    for key in ("train.non_finite_policy", "train.spike_policy"):
        if facts.value(key) == "rollback" and facts.config.checkpoint.save_interval is None:
            yield (
                f"{facts.cite(key, 'checkpoint.save_interval')}: without checkpoints during the run there is nothing "
                "to roll back to. Set checkpoint.save_interval to a number of steps, or the policy to skip or stop."
            )


def learning_rate(facts: Facts) -> Iterator[str]:
    """The optimizer's numbers make sense together."""
    optimizer = facts.config.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield (
            f"{facts.cite('optimizer.min_lr', 'optimizer.lr')}: the learning rate decays from lr to min_lr, so min_lr "
            "must "
            f"not be larger. Largest valid optimizer.min_lr: {optimizer.lr:g}."
        )
    for key, beta in (("optimizer.adam_beta1", optimizer.adam_beta1), ("optimizer.adam_beta2", optimizer.adam_beta2)):
        if beta >= 1.0:
            yield f"{facts.cite(key)}: a moment that never decays divides by zero. It must be below 1."


def constant_rate(facts: Facts) -> Iterator[str]:
    """A learning rate that stays has no end of its decay."""
    plan, optimizer = facts.config.schedule, facts.config.optimizer
    if plan.lr_decay_style != "constant":
        return
    style, floor, end = "schedule.lr_decay_style", "optimizer.min_lr", "schedule.lr_decay_iters"
    ignored = [floor] * (facts.is_set(floor) and optimizer.min_lr != optimizer.lr) + [end] * facts.is_set(end)
    for key in ignored:
        yield (
            f"{facts.cite(key, style)}: a constant learning rate never decays, so the former would be ignored. Leave "
            f"it out, or set {style}=cosine."
        )


def schedule(facts: Facts) -> Iterator[str]:
    """Warm-up, decay and WSD's last part follow one another."""
    plan = facts.config.schedule
    steps = plan.lr_decay_iters or facts.config.train.train_iters
    end = "schedule.lr_decay_iters" if plan.lr_decay_iters else "train.train_iters"
    if steps and plan.lr_warmup_iters >= steps:
        yield (
            f"{facts.cite('schedule.lr_warmup_iters', end)}: warm-up must end before the decay does. Largest valid "
            f"schedule.lr_warmup_iters: {steps - 1}."
        )
    style, last = "schedule.lr_decay_style", "schedule.lr_wsd_decay_iters"
    if plan.lr_decay_style != "WSD":
        for key in (last, "schedule.lr_wsd_decay_style"):
            if facts.is_set(key):
                yield f"{facts.cite(key, style)}: the former belongs to WSD and would be ignored. Leave it out."
    elif plan.lr_wsd_decay_iters is None:
        yield f"{facts.cite(style, last)}: WSD needs the number of steps of its last part. Set {last} (1 to {steps})."
    elif steps and plan.lr_warmup_iters < steps and plan.lr_warmup_iters + plan.lr_wsd_decay_iters > steps:
        yield (
            f"{facts.cite(last, 'schedule.lr_warmup_iters', end)}: WSD's last part must begin after warm-up. Largest "
            "valid "
            f"{last}: {steps - plan.lr_warmup_iters}."
        )


RULES = (
    precision,
    recompute_options,
    recompute_modules,
    recompute_biases,
    recompute_bounds,
    validation,
    roll_back,
    learning_rate,
    constant_rate,
    schedule,
)
