"""One configuration on one cluster -> seconds of a step, and where they go. No torch.

The step is the schedule of the pipeline (``plan.timeline``) over chunks whose seconds come from their operations
(``plan.layer`` and ``plan.cost``), then the rest of the gradient reduction, the update and the gathering of parameters.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

from megatron_slm.config.run_config import RunConfig
from megatron_slm.errors import ConfigError
from megatron_slm.model.counts import flops_per_token
from megatron_slm.parallel.fp8 import require_generation
from megatron_slm.parallel.layout import Layout
from megatron_slm.plan import timeline
from megatron_slm.plan.cluster import Cluster
from megatron_slm.plan.cost import TERA, Costs, Spent
from megatron_slm.plan.layer import (
    Kernels,
    Shape,
    embedding_pass,
    head_pass,
    layer_pass,
    prediction_pass,
    recomputed_layers,
    without_recomputation,
)
from megatron_slm.plan.ops import ELEMENT, FP8_ELEMENT, Pass
from megatron_slm.plan.rates import Rates
from megatron_slm.plan.timeline import Chunk, Played
from megatron_slm.plan.weights import Weights, chunk_split, stage_weights

SMALLEST_BUCKET = 40_000_000
"""Elements of a gradient bucket in core, or a million for each data-parallel rank where that is more."""


@dataclass(frozen=True)
class Prediction:
    """A step of one layout."""

    step_seconds: float
    tokens_per_second_per_gpu: float
    mfu: float
    """Model FLOPs utilisation: ``model.counts.flops_per_token`` (6 for each matrix weight a token meets, attention's
    causal half, recomputation not counted) x tokens / step / GPUs / bf16 dense peak."""
    bubble_share: float
    """Share of the pipeline schedule in which a stage, on average, does not compute."""
    exposed_seconds: float
    """Of the step in which the busiest stage waits for exchanges over tp, cp and ep, and for messages to neighbours
    that hold it up, and all wait for gradients and parameters."""
    reduction_seconds: float
    """After the last backward pass, until the gradients are reduced."""
    update_seconds: float
    """Of the optimizer."""
    gather_seconds: float
    """Of the parameters' gathering, where nothing hides it."""


@dataclass(frozen=True)
class Question:
    """What is predicted: a configuration and how fast things are."""

    config: RunConfig
    cluster: Cluster
    rates: Rates
    kernels: Kernels = Kernels()

    @property
    def layout(self) -> Layout:
        """The configuration's layout on the cluster's GPUs."""
        return Layout.from_config(self.config.parallel, self.cluster.gpus)

    def costs(self, stage: int) -> Costs:
        """Prices for the first rank of a pipeline stage."""
        layout = self.layout
        rank = stage * layout.world_size // layout.pipeline_model_parallel_size
        return Costs(self.cluster, self.rates, layout, rank)


def least_seconds(question: Question) -> float:
    """A step takes no less: the schedule's own bound, and the update. Much quicker than :func:`predict`."""
    return timeline.least_seconds(_chunks(chunk_spent(question)), micro_batches(question))


def predict(question: Question) -> Prediction:
    """Seconds of a step and where they go.

    Raises:
        ConfigError: the layout does not fit the GPUs, the layers or the batch, or the GPU's FP8 peak is not known.
    """
    config = question.config
    if config.precision.fp8 is not None:
        require_generation(config.precision, question.cluster.architecture, question.cluster.name)
        if question.cluster.fp8_tflops is None:
            raise ConfigError(
                f"precision.fp8 = {config.precision.fp8} on {question.cluster.name}: its peak in FP8 is not known. "
                "Give fp8_tflops in the cluster's file, or leave precision.fp8 out."
            )
    if config.model.vocab_size is None:
        raise ConfigError("model.vocab_size is not set, and the output layer's cost depends on it. Set it.")
    spent = chunk_spent(question)
    chunks, sends = _chunks(spent), _send_seconds(question)
    hidden = config.parallel.vpp_size > 1 and question.kernels.hides_interleaved_sends
    played = timeline.play(chunks, micro_batches(question), sends, sends_hidden=hidden)
    weights = stage_weights(config)
    stages = range(len(weights))
    reduced = max(_reduced(question, weights[stage], played, stage) for stage in stages) + _tied_seconds(question)
    update = max(_update_seconds(question, stage) for stage in weights)
    gather = max(_gather_seconds(question, weights[stage], chunks[stage]) for stage in stages)
    step = reduced + update + gather
    busiest = max(stages, key=lambda stage: played.busy[stage])
    waited = sum(forward.exposed_seconds + backward.exposed_seconds for forward, backward in spent[busiest])
    if not hidden and len(chunks) > 1:
        waited += 2 * len(chunks[busiest]) * sends[busiest]
    tokens = config.train.global_batch_size * config.model.seq_length
    model_flops = tokens * flops_per_token(config.model, config.model.vocab_size)
    gpus = question.layout.world_size
    return Prediction(
        step_seconds=step,
        tokens_per_second_per_gpu=tokens / step / gpus,
        mfu=model_flops / step / gpus / (question.cluster.bf16_tflops * TERA),
        bubble_share=played.bubble_share,
        exposed_seconds=micro_batches(question) * waited + reduced - played.seconds + gather,
        reduction_seconds=reduced - played.seconds,
        update_seconds=update,
        gather_seconds=gather,
    )


def micro_batches(question: Question) -> int:
    """Of one replica in one step."""
    train = question.config.train
    return question.layout.num_microbatches(train.global_batch_size, train.micro_batch_size)


def chunk_passes(question: Question) -> list[list[list[tuple[Pass, int]]]]:
    """``[stage][chunk]`` -> passes, each with how often it comes."""
    config = question.config
    kernels = dataclasses.replace(question.kernels, fp8=config.precision.fp8 is not None)
    model, shape = config.model, Shape.of(config)
    whole = config.train.recompute_granularity == "full"
    layers: dict[tuple[bool, bool], Pass] = {}
    found: list[list[list[tuple[Pass, int]]]] = []
    for stage in chunk_split(config):
        found.append([])
        for chunk in stage:
            again = recomputed_layers(config, chunk)
            counts = Counter((model.is_moe_layer(layer), layer in again) for layer in chunk)
            for moe, twice in counts.keys() - layers.keys():
                of = config if twice or not whole else without_recomputation(config)
                layers[moe, twice] = layer_pass(of, moe=moe, kernels=kernels)
            found[-1].append([(layers[kind], count) for kind, count in counts.items()])
    found[0][0].append((embedding_pass(model, shape), 1))
    head, depths = head_pass(model, shape, kernels), model.mtp_num_layers or 0
    found[-1][-1].append((head, 1 + depths))
    if depths:
        like = layer_pass(config, moe=model.is_moe_layer(model.num_layers - 1), kernels=kernels)
        found[-1][-1].append((prediction_pass(model, shape, kernels) + like, depths))
    return found


def chunk_spent(question: Question) -> list[list[tuple[Spent, Spent]]]:
    """``[stage][chunk]`` -> what a forward and a backward pass of one micro-batch costs."""
    known: dict[int, tuple[Spent, Spent]] = {}
    costs = question.costs(0)  # the groups of every stage lie alike
    found: list[list[tuple[Spent, Spent]]] = []
    for stage in chunk_passes(question):
        found.append([])
        for chunk in stage:
            forward, backward = Spent(), Spent()
            for each, count in chunk:
                if id(each) not in known:
                    known[id(each)] = (costs.of(each.forward), costs.of(each.backward))
                one, other = known[id(each)]
                forward, backward = forward + one * count, backward + other * count
            found[-1].append((forward, backward))
    return found


def send_bytes(question: Question) -> float:
    """Of the message between two pipeline stages that one rank sends, either way."""
    shape = Shape.of(question.config)
    scattered = question.kernels.scatters_sends and not shape.sequence_parallel
    tokens = shape.tokens // shape.tp if scattered else shape.own_tokens
    return float(ELEMENT * tokens * question.config.model.hidden_size)


def _chunks(spent: list[list[tuple[Spent, Spent]]]) -> list[list[Chunk]]:
    return [[Chunk(forward.seconds, backward.seconds) for forward, backward in stage] for stage in spent]


def _send_seconds(question: Question) -> list[float]:
    """``[stage]`` -> of a message to the next one; shares of it are gathered over tp where it has arrived."""
    shape, size = Shape.of(question.config), send_bytes(question)
    found = []
    for stage in range(question.config.parallel.pipeline_model_parallel_size):
        costs = question.costs(stage)
        found.append(costs.send_seconds(size))
        if question.kernels.scatters_sends and not shape.sequence_parallel:
            found[-1] += costs.exchange_seconds("all_gather", size * shape.tp, costs.span("tp"))
    return found


def _reduced(question: Question, chunks: list[Weights], played: Played, stage: int) -> float:
    """When this stage's gradients are reduced, in seconds of the schedule."""
    parallel, backward = question.config.parallel, played.last_backward[stage]
    last = max(end for _, end in backward)
    free, collective = 0.0, "reduce_scatter" if parallel.use_distributed_optimizer else "all_reduce"
    for chunk in sorted(range(len(chunks)), key=lambda index: backward[index][1]):
        seconds = _exchange(question, chunks[chunk], collective, question.kernels.gradient_bytes)
        start, end = backward[chunk]
        if not parallel.overlap_grad_reduce:
            start = end = last
        elif chunk > 0:
            start = end  # later chunks are one bucket, reduced when it is full
        # The last bucket is full when the backward pass ends.
        tail = seconds * min(1.0, _bucket(question) / max(1, chunks[chunk].total))
        free = max(max(free, start) + seconds, end + tail)
    return max(free, last)


def _bucket(question: Question) -> int:
    """Elements of one gradient bucket."""
    return question.config.parallel.ddp_bucket_size or max(
        SMALLEST_BUCKET, 1_000_000 * question.layout.data_parallel_size
    )


def _exchange(question: Question, weights: Weights, collective: str, size: int) -> float:
    """Seconds of one exchange of a chunk's gradients or parameters with the other replicas."""
    costs = question.costs(0)
    dense = costs.exchange_seconds(collective, float(size * weights.dense), costs.span("dp-cp"))
    if not weights.expert:
        return dense
    return dense + costs.exchange_seconds(collective, float(size * weights.expert), costs.span("edp"))


def _update_seconds(question: Question, chunks: list[Weights]) -> float:
    """Of the optimizer over this stage's share of the weights: it does little but move bytes."""
    costs = question.costs(0)
    weights = sum(chunks, Weights())
    shares = (costs.span("dp-cp").size, costs.span("edp").size)
    if not question.config.parallel.use_distributed_optimizer:
        shares = (1, 1)
    elements = weights.dense / shares[0] + weights.expert / shares[1]
    return costs.streaming_seconds(elements * question.kernels.optimizer_bytes_per_parameter)


def _gather_seconds(question: Question, weights: list[Weights], chunks: list[Chunk]) -> float:
    """Of bringing every replica the new parameters; overlapped, what the first forward pass is too short for."""
    parallel = question.config.parallel
    if not parallel.use_distributed_optimizer:
        return 0.0
    element = FP8_ELEMENT if question.config.precision.fp8_param_gather else ELEMENT
    seconds = _exchange(question, sum(weights, Weights()), "all_gather", element)
    if not parallel.overlap_param_gather:
        return seconds
    bucket = seconds * min(1.0, _bucket(question) / max(1, sum(weights, Weights()).total))
    return max(bucket, seconds - sum(chunk.forward for chunk in chunks))


def _tied_seconds(question: Question) -> float:
    """First and last stage add their gradients of a matrix they share."""
    model, parallel = question.config.model, question.config.parallel
    stages = parallel.pipeline_model_parallel_size
    if model.untie_embeddings_and_output_weights or stages == 1:
        return 0.0
    rows = model.padded_vocab_size(model.vocab_size or 1)
    size = question.kernels.gradient_bytes * rows * model.hidden_size / parallel.tensor_model_parallel_size
    costs = question.costs(stages - 1)
    return costs.send_seconds(size)  # an all-reduce of two: each sends the whole of it once
