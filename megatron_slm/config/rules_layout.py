"""Rules about how a job is divided over ranks: what megatron-core would assert after the job has started."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_slm.config.facts import Facts, nearest_divisors
from megatron_slm.errors import ConfigError
from megatron_slm.parallel.layout import layer_split, nearest_multiples

TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"


def tensor_parallel(facts: Facts) -> Iterator[str]:
    """Every matrix and every head divides over tp."""
    model, tp = facts.config.model, facts.config.parallel.tensor_model_parallel_size
    heads, groups = model.num_attention_heads, model.query_groups
    if heads % tp:
        yield (
            f"{facts.cite('model.num_attention_heads', TP)}: the heads must divide evenly over tp. "
            f"{nearest_divisors(TP, heads, tp)} {nearest_multiples('model.num_attention_heads', heads, tp)}"
        )
    if groups % tp and tp % groups:
        yield (
            f"{facts.cite('model.num_query_groups', TP)}: the {groups} key/value heads must be a multiple or a divisor "
            "of "
            f"tp. {nearest_divisors(TP, groups, tp)}"
        )
    elif groups < tp and (heads + 2 * groups) * model.head_dim % tp:
        yield (
            f"{facts.cite('model.num_query_groups', TP)}: the {(heads + 2 * groups) * model.head_dim} rows of the "
            "joint "
            f"query/key/value matrix must divide evenly over tp. {nearest_divisors(TP, groups, tp)}"
        )
    dense = not all(model.is_moe_layer(layer) for layer in range(model.num_layers))
    if dense and model.ffn_size % tp:
        yield (
            f"{facts.cite('model.ffn_hidden_size', TP)}: the {model.ffn_size} inner channels of the MLP must divide "
            "evenly "
            f"over tp. {nearest_multiples('model.ffn_hidden_size', model.ffn_size, tp)} "
            f"{nearest_divisors(TP, model.ffn_size, tp)}"
        )


def vocabulary(facts: Facts) -> Iterator[str]:
    """The padded vocabulary divides over tp."""
    model, tp = facts.config.model, facts.config.parallel.tensor_model_parallel_size
    multiple = model.make_vocab_size_divisible_by
    rows = multiple if model.vocab_size is None else model.padded_vocab_size(model.vocab_size)
    if rows % tp == 0:
        return
    what = "a multiple of" if model.vocab_size is None else f"the {rows} rows that come of"
    yield (
        f"{facts.cite('model.make_vocab_size_divisible_by', TP)}: {what} the former must divide evenly over tp. "
        f"{nearest_multiples('model.make_vocab_size_divisible_by', multiple, tp)}"
    )


def sequence_parallel(facts: Facts) -> Iterator[str]:
    """Sequence parallelism divides the sequence over a tp of at least 2."""
    parallel, length = facts.config.parallel, facts.config.model.seq_length
    if not parallel.sequence_parallel:
        return
    tp = parallel.tensor_model_parallel_size
    if tp == 1:
        yield (
            f"{facts.cite('parallel.sequence_parallel', TP)}: there is nothing to divide the sequence over. Raise {TP} "
            "to at "
            "least 2, or set parallel.sequence_parallel=false."
        )
    elif parallel.context_parallel_size == 1 and length % tp:
        yield (
            f"{facts.cite('model.seq_length', TP)}: with sequence_parallel the sequence must divide evenly over tp. "
            f"{nearest_multiples('model.seq_length', length, tp)}"
        )


def pipeline(facts: Facts) -> Iterator[str]:
    """The layers, with what counts as one, divide over the pipeline's chunks."""
    parallel = facts.config.parallel
    keys = [PP]
    if parallel.vpp_size > 1:
        keys.append(VPP)
        if parallel.pipeline_model_parallel_size == 1:
            yield (
                f"{facts.cite(VPP, PP)}: interleaving needs at least 2 pipeline stages. Raise {PP}, or leave {VPP} out."
            )
            return
    flags = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
    keys += [f"parallel.{flag}" for flag in flags if getattr(parallel, flag)]
    try:
        layer_split(facts.config.model.num_layers, parallel)
    except ConfigError as error:
        yield f"{facts.cite('model.num_layers', *keys)}: {error}"


def world(facts: Facts) -> Iterator[str]:
    """The world is a whole number of model replicas."""
    parallel = facts.config.parallel
    replica = parallel.model_parallel_size
    if facts.world_size % replica:
        yield (
            f"world size {facts.world_size} with {facts.cite(TP, PP, 'parallel.context_parallel_size')}: the ranks "
            "must be "
            f"a multiple of one model replica, {replica} ranks. "
            f"{nearest_multiples('world size', facts.world_size, replica)}"
        )


def batch(facts: Facts) -> Iterator[str]:
    """A step is a whole number of micro-batches on every replica, in groups of pp when interleaved."""
    train, parallel = facts.config.train, facts.config.parallel
    dp, left = divmod(facts.world_size, parallel.model_parallel_size)
    if left or not dp:
        return  # the rule on the world speaks already, and dp is unknown
    samples = train.micro_batch_size * dp
    if train.global_batch_size % samples:
        yield (
            f"{facts.cite('train.global_batch_size', 'train.micro_batch_size')} on {facts.world_size} ranks: a step "
            "must be "
            f"a multiple of micro_batch_size x data-parallel size = {train.micro_batch_size} x {dp} = {samples} "
            "samples. "
            f"{nearest_multiples('train.global_batch_size', train.global_batch_size, samples)}"
        )
        return
    microbatches, pp = train.global_batch_size // samples, parallel.pipeline_model_parallel_size
    if parallel.vpp_size > 1 and pp > 1 and microbatches % pp:
        yield (
            f"{facts.cite(VPP, PP, 'train.global_batch_size')}: the interleaved schedule needs a multiple of pp "
            "micro-batches "
            f"on every replica, but there are {microbatches}. "
            f"{nearest_multiples('train.global_batch_size', train.global_batch_size, samples * pp)}"
        )


def noise_scale(facts: Facts) -> Iterator[str]:
    """The noise scale compares a part of the step with the whole of it."""
    train, parallel = facts.config.train, facts.config.parallel
    interval, batch_size = "log.noise_scale_interval", "train.global_batch_size"
    dp = facts.world_size // parallel.model_parallel_size
    samples = train.micro_batch_size * dp
    if facts.config.log.noise_scale_interval is None or not dp or train.global_batch_size % samples:
        return  # not asked for, or another rule speaks already
    part = parallel.pipeline_model_parallel_size if parallel.vpp_size > 1 else 1
    if train.global_batch_size // samples <= part:
        yield (
            f"{facts.cite(interval, batch_size, 'train.micro_batch_size')}: the gradient of the first {part * samples} "
            "samples is compared with that of the whole step, which must be larger. Smallest valid "
            f"{batch_size}: {2 * part * samples}; or lower train.micro_batch_size, or leave {interval} out."
        )


def gradient_exchange(facts: Facts) -> Iterator[str]:
    """Options of the data-parallel exchange that core would ignore or refuse."""
    parallel = facts.config.parallel
    gather, fp32 = "parallel.overlap_param_gather", "parallel.reduce_scatter_with_fp32_accumulation"
    sharded, overlap = "parallel.use_distributed_optimizer", "parallel.overlap_grad_reduce"
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        yield (
            f"{facts.cite(gather, sharded)}: only the distributed optimizer gathers parameters. Set {sharded}=true, or "
            f"{gather}=false."
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield (
            f"{facts.cite(gather, overlap)}: the gather is launched by the buckets of the overlapped reduction. Set "
            f"{overlap}=true, or {gather}=false."
        )
    if parallel.reduce_scatter_with_fp32_accumulation and not parallel.use_distributed_optimizer:
        yield (
            f"{facts.cite(fp32, sharded)}: without the distributed optimizer gradients are all-reduced, not "
            f"reduce-scattered, and the option would be ignored. Set {sharded}=true, or {fp32}=false."
        )
    if parallel.reduce_scatter_with_fp32_accumulation and facts.config.precision.fp64:
        yield (
            f"{facts.cite(fp32, 'precision.fp64')}: sums in fp32 would round float64 gradients. Set {fp32}=false, or "
            "precision.fp64=false."
        )
    if parallel.ddp_bucket_size is not None and not parallel.overlap_grad_reduce:
        yield (
            f"{facts.cite('parallel.ddp_bucket_size', overlap)}: without overlap core reduces one bucket and would "
            "ignore the "
            f"size. Set {overlap}=true, or leave parallel.ddp_bucket_size out."
        )


def backend(facts: Facts) -> Iterator[str]:
    """NCCL moves GPU memory only."""
    parallel = facts.config.parallel
    if parallel.device == "cpu" and parallel.distributed_backend == "nccl":
        yield (
            f"{facts.cite('parallel.device', 'parallel.distributed_backend')}: NCCL exchanges GPU memory only. Set "
            "parallel.distributed_backend=gloo, or leave it out."
        )


RULES = (
    tensor_parallel,
    vocabulary,
    sequence_parallel,
    pipeline,
    world,
    batch,
    noise_scale,
    gradient_exchange,
    backend,
)
