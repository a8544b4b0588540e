"""Generation with a cache: it says what the training forward says, under every layout, and leaves no trace in training.

The weights are drawn wide, so that attention looks at some tokens much more than at others: a wrong position, a padding
that is seen or a lost column then changes the log-probabilities by far more than rounding does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from megatron_slm.model.config import ModelConfig
from megatron_slm.rollout.sampling import Sampling
from megatron_slm.train.config import PrecisionConfig
from tests.breadth import BREADTH
from tests.dist.test_latent import LATENT
from tests.pool import RankPool
from tests.ranks import RankFailure
from tests.training import SMALL, VOCAB, Task, build, micro_batches

WIDE = 0.2
DENSE = replace(SMALL, init_method_std=WIDE, num_layers=2)
LEARNED = replace(DENSE, position_embedding_type="learned_absolute")
LATENTS = replace(LATENT, init_method_std=WIDE, num_layers=2)
EXPERTS = replace(DENSE, num_moe_experts=4, moe_ffn_hidden_size=96)
MODELS = {"dense": DENSE, "learned positions": LEARNED, "latent": LATENTS, "experts": EXPERTS}

TP2: dict[str, Any] = {"tensor_model_parallel_size": 2}
PP2: dict[str, Any] = {"pipeline_model_parallel_size": 2}
SP: dict[str, Any] = {"sequence_parallel": True}
VPP2: dict[str, Any] = PP2 | {"virtual_pipeline_model_parallel_size": 2}
EP2: dict[str, Any] = {"expert_model_parallel_size": 2}
LAYOUTS = {"tp2": (2, TP2), "pp2": (2, PP2), "tp2-sp": (2, TP2 | SP), "tp2-pp2-sp": (4, TP2 | PP2 | SP)}

PROMPTS = [[5, 17, 230], [401], list(range(40, 52)), [9] * 7, [77, 3, 250, 499], [8, 9]]
SAMPLING = Sampling(max_new_tokens=10, temperature=0.9, top_p=0.9, seed=5, stop_ids=tuple(range(30)))


@dataclass(frozen=True)
class Request:
    """What is generated, and how."""

    task: Task
    sampling: Sampling = SAMPLING
    prompts: Sequence[Sequence[int]] = tuple(map(tuple, PROMPTS))
    batch_size: int = 6
    step: int = 3
    first_sample: int = 100
    apart: bool = False
    """Every copy of the model takes the prompts whose number is its own, modulo the copies."""


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as started:
        yield started


def request(model: str, *, exact: bool = True, **degrees: Any) -> Request:
    return Request(Task(MODELS[model], precision=PrecisionConfig(fp64=exact)).on(**degrees))


def completions(request: Request, chunks: Any, groups: Any) -> list[Any]:
    from megatron_slm.rollout.generate import complete

    numbers = list(range(len(request.prompts)))
    if request.apart:
        numbers = numbers[groups.dp.rank() :: groups.dp.size()]
    return complete(
        chunks,
        [request.prompts[number] for number in numbers],
        request.sampling,
        step=request.step,
        samples=[request.first_sample + number for number in numbers],
        groups=groups,
        vocab_size=VOCAB,
        device=torch.device("cpu"),
        batch_size=request.batch_size,
    )


def generate(request: Request) -> list[Any]:
    """This rank's completions."""
    groups, chunks, _ = build(request.task)
    return completions(request, chunks, groups)


def said(results: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [(one.tokens, one.finished) for one in results]


def furthest(results: Sequence[Any], expected: Sequence[Any]) -> float:
    """Largest difference of a log-probability, of either kind."""
    return max(
        abs(a - b)
        for one, other in zip(results, expected, strict=True)
        for name in ("logprobs", "raw_logprobs")
        for a, b in zip(getattr(one, name), getattr(other, name), strict=True)
    )


def kept(results: Sequence[Any]) -> list[list[list[int]]]:
    return [[ids.tolist() for ids in one.kept] for one in results]


def generate_and_score(request: Request) -> tuple[list[Any], float]:
    """Completions, and how far their raw log-probabilities are from those of the training modules and schedule."""
    from megatron_slm.parallel.pipeline import run_schedule

    groups, chunks, _ = build(request.task)
    results = completions(request, chunks, groups)
    worst = [0.0]
    for prompt, one in zip(request.prompts, results, strict=True):
        tokens = [*prompt, *one.tokens]
        tokens += [0] * (-len(tokens) % groups.tp.size())  # what follows changes nothing before it
        ids = torch.tensor([tokens])
        batch = {
            "tokens": ids,
            "position_ids": torch.arange(len(tokens))[None],
            "labels": ids,
            "loss_mask": ids.float(),
        }

        def compare(logits: Any, batch: Any, prompt: Any = prompt, one: Any = one) -> Any:
            logprobs = torch.log_softmax(whole(logits, groups).double(), dim=-1)
            found = [logprobs[0, len(prompt) - 1 + i, token].item() for i, token in enumerate(one.tokens)]
            worst[0] = max(worst[0], *(abs(a - b) for a, b in zip(found, one.raw_logprobs, strict=True)))
            return logits.sum() * 0, torch.tensor(1), {}

        with torch.no_grad(), without_labels(chunks):
            run_schedule([*chunks], [batch], compare, forward_only=True, seq_length=len(tokens), groups=groups)
    return results, worst[0]


def whole(logits: torch.Tensor, groups: Any) -> torch.Tensor:
    """Logits [B, S, V/tp] -> [B, S, V] of the real vocabulary."""
    import torch.distributed as dist

    parts = [torch.empty_like(logits) for _ in range(groups.tp.size())]
    dist.all_gather(parts, logits.contiguous(), group=groups.tp)
    return torch.cat(parts, dim=-1)[..., :VOCAB]


class without_labels:
    """The chunks end in logits for a while."""

    def __init__(self, chunks: Any) -> None:
        self._handles = [
            chunk.register_forward_pre_hook(
                lambda module, args, kwargs: (args, {**kwargs, "labels": None}), with_kwargs=True
            )
            for chunk in chunks
        ]

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


@pytest.mark.parametrize("model", MODELS)
def test_cached_log_probabilities_are_those_of_the_training_forward(pool: RankPool, model: str) -> None:
    """On one rank and on several; in float64 to the last digits, in float32 to 1e-5."""
    layouts: dict[str, tuple[int, dict[str, Any]]] = {"one": (1, {}), **LAYOUTS}
    if model == "experts":
        layouts = {"one": (1, {}), "tp2-sp": LAYOUTS["tp2-sp"], "ep2": (2, EP2)}
    elif model != "dense":
        layouts = {"one": (1, {}), "tp2-sp": LAYOUTS["tp2-sp"]}
    expected: list[Any] = []
    for exact, tolerance in ((True, 1e-12), (False, 1e-5)):
        for name, (ranks, degrees) in layouts.items():
            if name == "tp2-pp2-sp" and not exact:
                continue  # its parts have been seen
            answers = pool.call(generate_and_score, ranks, request(model, exact=exact, **degrees))
            assert max(gap for _, gap in answers) <= tolerance, (name, exact)
            expected = expected or answers[0][0]
            for results, _ in answers:
                assert said(results) == said(expected), (name, exact)
                assert kept(results) == kept(expected), (name, exact)
                assert furthest(results, expected) <= tolerance, (name, exact)
    assert any(one.finished for one in expected) and not all(one.finished for one in expected)
    assert len({one.tokens for one in expected}) == len(PROMPTS)


def test_samples_do_not_depend_on_batch_company_or_interleaving(pool: RankPool) -> None:
    base = request("dense")
    (expected,) = pool.call(generate, 1, base)
    for batch_size in (1, 2, 5):
        (results,) = pool.call(generate, 1, replace(base, batch_size=batch_size))
        assert said(results) == said(expected) and furthest(results, expected) <= 1e-12, batch_size
    four_layers = replace(base, task=replace(base.task, model=replace(DENSE, num_layers=4)))
    (expected,) = pool.call(generate, 1, four_layers)
    for results in pool.call(generate, 2, replace(four_layers, task=four_layers.task.on(**VPP2))):
        assert said(results) == said(expected) and furthest(results, expected) <= 1e-12


def test_copies_with_other_prompts_or_none_share_experts(pool: RankPool) -> None:
    base = request("experts")
    (expected,) = pool.call(generate, 1, base)
    apart = replace(base, task=base.task.on(**EP2), apart=True, batch_size=2)
    for copy, results in enumerate(pool.call(generate, 2, apart)):
        assert said(results) == said(expected[copy::2]) and furthest(results, expected[copy::2]) <= 1e-12
    busy, idle = pool.call(generate, 2, replace(apart, prompts=base.prompts[:1]))
    assert said(busy) == said(expected[:1]) and idle == []


def streamed(request: Request) -> tuple[list[int], list[int]]:
    """The first prompt's tokens as they come; and with room for more than the model's positions hold."""
    from megatron_slm.rollout.generate import stream

    groups, chunks, _ = build(request.task)
    given = {"groups": groups, "vocab_size": VOCAB, "device": torch.device("cpu")}
    first, long = request.sampling, replace(request.sampling, max_new_tokens=90, stop_ids=())
    found = [list(stream(chunks, request.prompts[0], sampling, **given)) for sampling in (first, long)]
    assert all(module.training for chunk in chunks for module in chunk.modules())
    return found[0], found[1]


def test_a_stream_says_the_same_and_goes_on_where_the_positions_end(pool: RankPool) -> None:
    asked = replace(request("dense"), prompts=PROMPTS[:1])
    ((tokens, long),) = pool.call(streamed, 1, asked)
    for divided in pool.call(streamed, 2, replace(asked, task=asked.task.on(**TP2))):
        assert divided == (tokens, long)
    (expected,) = pool.call(generate, 1, replace(asked, step=0, first_sample=0))
    assert tuple(tokens) == expected[0].tokens
    assert len(long) == 90 and long[: len(tokens)] == tokens


def test_greedy_stops_and_limits(pool: RankPool) -> None:
    """Without temperature the seed has no effect; a stop token ends a row and belongs to it; the model's end is one."""
    greedy = replace(request("dense"), sampling=Sampling(max_new_tokens=6, temperature=0.0, seed=1))
    (expected,) = pool.call(generate, 1, greedy)
    (again,) = pool.call(generate, 1, replace(greedy, sampling=replace(greedy.sampling, seed=2)))
    assert said(again) == said(expected) and {len(one.tokens) for one in expected} == {6}
    assert all(set(one.logprobs) == {0.0} and max(one.raw_logprobs) < 0.0 for one in expected)
    assert not any(one.finished for one in expected)
    stops = tuple({one.tokens[2] for one in expected})
    (stopped,) = pool.call(generate, 1, replace(greedy, sampling=replace(greedy.sampling, stop_ids=stops)))
    for one, free in zip(stopped, expected, strict=True):
        end = next(i for i, token in enumerate(free.tokens) if token in stops) + 1
        assert (
            one.finished
            and one.tokens == free.tokens[:end]
            and one.raw_logprobs == pytest.approx(free.raw_logprobs[:end])
        )
    long = [3] * (DENSE.seq_length - 2)
    (cut,) = pool.call(
        generate, 1, replace(greedy, prompts=[long, [5]], sampling=replace(greedy.sampling, max_new_tokens=40))
    )
    assert [len(one.tokens) for one in cut] == [2, DENSE.seq_length - 1] and not cut[0].finished


@pytest.mark.parametrize(
    ("prompts", "degrees", "model", "message"),
    [
        ([[1], []], {}, DENSE, r"Prompt 1 \(sample 101\) has 0 tokens, but the model reads 1 to 31"),
        ([[1] * 32], {}, DENSE, r"Prompt 0 \(sample 100\) has 32 tokens"),
        ([[1]], {"context_parallel_size": 2}, DENSE, "parallel.context_parallel_size=2"),
        ([[1]], {}, replace(EXPERTS, moe_expert_capacity_factor=1.0), "model.moe_expert_capacity_factor=1.0"),
        ([[1]], EP2 | {"moe_token_dispatcher_type": "allgather"}, EXPERTS, "moe_token_dispatcher_type=allgather"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    pool: RankPool, prompts: Any, degrees: dict[str, Any], model: ModelConfig, message: str, capfd: Any
) -> None:
    refused = Request(Task(model).on(**degrees), prompts=prompts)
    with pytest.raises(RankFailure, match=message):
        pool.call(generate, 2 if degrees else 1, refused)


def spoiled(request: Request) -> None:
    from megatron_slm.parallel.gradients import unwrap

    groups, chunks, _ = build(request.task)
    if groups.pp.rank() == groups.pp.size() - 1:
        with torch.no_grad():
            unwrap(chunks[-1]).decoder.final_layernorm.weight[3] = float("nan")
    completions(request, chunks, groups)


def test_weights_that_are_not_finite_are_said_on_every_rank(pool: RankPool) -> None:
    with pytest.raises(RankFailure, match="not finite: the weights hold NaN"):
        pool.call(spoiled, 2, request("dense", **PP2))


def trained(request: Request, rollouts: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Gradient norms and this rank's weights after three steps, with or without rollouts before each."""
    from megatron_slm.parallel.gradients import zero_gradients
    from megatron_slm.parallel.pipeline import run_schedule
    from megatron_slm.stages import pretrain
    from megatron_slm.train.optimizer import apply_update, gradient_norm

    groups, chunks, optimizer = build(request.task)
    norms = []
    for step in range(3):
        if rollouts:
            completions(request, chunks, groups)
            torch.distributed.barrier()  # as any exchange: nobody may be left in a gather that others come to later
        zero_gradients(chunks)
        optimizer.zero_grad()
        batches = micro_batches(request.task, step, groups)
        length = request.task.model.seq_length
        run_schedule(chunks, batches, pretrain.loss, forward_only=False, seq_length=length, groups=groups)
        norms.append(gradient_norm(optimizer))
        apply_update(optimizer, norms[-1])
    return norms, {name: tensor.detach().clone() for chunk in chunks for name, tensor in chunk.named_parameters()}


@pytest.mark.parametrize(
    ("model", "ranks", "degrees"),
    [
        ("dense", 2, TP2 | SP),
        pytest.param("dense", 2, PP2, marks=BREADTH),
        ("dense", 2, {"overlap_param_gather": True, "overlap_grad_reduce": True, "ddp_bucket_size": 20000}),
        ("experts", 2, EP2),
        pytest.param("latent", 2, TP2, marks=BREADTH),
    ],
)
def test_training_is_bitwise_the_same_with_and_without_generation(
    pool: RankPool, model: str, ranks: int, degrees: dict[str, Any]
) -> None:
    """Dropout draws from the same streams, the modules are in the same mode, nothing of a cache is left."""
    asked = request(model, exact=False, **degrees)
    dropping = replace(asked.task.model, hidden_dropout=0.1)
    asked = replace(asked, task=replace(asked.task, model=dropping), apart=True, prompts=asked.prompts[:1])
    plain, generated = (pool.call(trained, ranks, asked, rollouts) for rollouts in (False, True))
    for (norms, weights), (other_norms, other_weights) in zip(plain, generated, strict=True):
        assert norms == other_norms and min(norms) > 0
        assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
