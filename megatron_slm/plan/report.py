"""What a search has found, as a table, as JSON, and as a configuration that `mslm train` takes. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from megatron_slm.config.keys import all_keys
from megatron_slm.config.load import value_of
from megatron_slm.config.run_config import RunConfig
from megatron_slm.config.values import show
from megatron_slm.memory.capacity import GIB
from megatron_slm.plan.predict import Question
from megatron_slm.plan.rates import constants
from megatron_slm.plan.search import Candidate, Found
from megatron_slm.plan.volumes import by_link, traffic

MFU = (
    "MFU: 6 FLOPs for each matrix weight a token meets + attention's causal half (mslm check), x tokens, over step x "
    "GPUs x bf16 dense peak; recomputation is not counted"
)
_NEAREST = "faster, but too large, or tight (--tight takes those that are expected to fit):"
_NOTHING = "nothing fits; nearest are these. More GPUs, or GPUs with more memory, divide it further:"
_HEAD = "tp pp vpp cp ep etp mbs recompute sp | step s  tok/s/GPU  MFU %  GiB low-high verdict | bubble % exposed s"


def table(found: Found, question: Question, shown: int, price: float | None) -> str:
    """The fastest layouts that fit, and the near misses with what they lack."""
    cluster = question.cluster
    lines = [
        f"{found.considered} layouts on {cluster.gpus} x {cluster.name}: {found.fits} fit, {found.too_large} do "
        f"not, {sum(found.refused.values())} break a rule{_refusals(found)}",
        "",
        _heading(price),
        *(_row(candidate, price) for candidate in found.fitting[:shown]),
    ]
    if found.near_misses:
        lines += ["", _NEAREST if found.fitting else _NOTHING]
        lines += [why_not(candidate, question) for candidate in found.near_misses[:shown]]
    if found.fitting:
        lines += ["", *_traffic_lines(found.fitting[0], question)]
    return "\n".join([*lines, "", MFU])


def why_not(candidate: Candidate, question: Question) -> str:
    """One sentence on a layout that does not fit."""
    capacity = question.cluster.memory_bytes / GIB
    needed, high = candidate.memory.expected / GIB, candidate.memory.high / GIB
    lacks = f"needs {needed:.1f} GiB (up to {high:.1f}) of {capacity:.1f}"
    return f"  {degrees(candidate.config)}: {candidate.prediction.step_seconds:.3f} s, {lacks}"


def degrees(config: RunConfig) -> str:
    """A layout in words: ``tp8 pp16 vpp8 cp2 mbs1 sp``."""
    parallel, train = config.parallel, config.train
    sizes = {
        "tp": parallel.tensor_model_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "vpp": parallel.vpp_size,
        "cp": parallel.context_parallel_size,
        "ep": parallel.expert_model_parallel_size,
    }
    words = [f"{axis}{size}" for axis, size in sizes.items() if size > 1 or axis in ("tp", "pp")]
    words.append(f"mbs{train.micro_batch_size}")
    if parallel.sequence_parallel:
        words.append("sp")
    return " ".join([*words, f"recompute={recomputed(config)}"])


def recomputed(config: RunConfig) -> str:
    """What the backward pass runs again."""
    train = config.train
    if train.recompute_granularity == "selective":
        return "+".join(train.recompute_modules)
    if train.recompute_method == "block":
        return f"{train.recompute_num_layers}/chunk"
    return train.recompute_granularity or "none"


def cost_per_billion_tokens(candidate: Candidate, price_per_gpu_hour: float) -> float:
    """In the currency of the price."""
    seconds = 1e9 / candidate.prediction.tokens_per_second_per_gpu
    return seconds / 3600 * price_per_gpu_hour


def record(candidate: Candidate, question: Question, price: float | None) -> dict[str, Any]:
    """One layout as JSON values."""
    config, prediction = candidate.config, candidate.prediction
    asked = Question(config, question.cluster, question.rates, question.kernels)
    entries = traffic(asked)
    links = by_link(entries)
    return {
        "layout": {key: value_of(config, key) for key in _layout_keys()},
        "step_seconds": prediction.step_seconds,
        "tokens_per_second_per_gpu": prediction.tokens_per_second_per_gpu,
        "mfu": prediction.mfu,
        "bubble_share": prediction.bubble_share,
        "exposed_seconds": prediction.exposed_seconds,
        "reduction_seconds": prediction.reduction_seconds,
        "update_seconds": prediction.update_seconds,
        "gather_seconds": prediction.gather_seconds,
        "memory_bytes": {
            "low": round(candidate.memory.low),
            "expected": round(candidate.memory.expected),
            "high": round(candidate.memory.high),
        },
        "verdict": candidate.verdict,
        "sent_bytes_per_rank": {
            "inside_node": round(links.inside),
            "between_nodes": round(links.between),
            "by_axis": [
                {
                    "axis": entry.axis,
                    "collective": entry.collective,
                    "times": entry.times,
                    "inside_node": round(entry.sent.inside),
                    "between_nodes": round(entry.sent.between),
                }
                for entry in entries
            ],
        },
        "cost_per_billion_tokens": None if price is None else cost_per_billion_tokens(candidate, price),
    }


def to_json(found: Found, question: Question, shown: int, price: float | None, notes: Sequence[str]) -> str:
    """Everything a search has found."""
    cluster, rates = question.cluster, question.rates
    return json.dumps(
        {
            "cluster": {"name": cluster.name, "gpus": cluster.gpus, "gpus_per_node": cluster.gpus_per_node},
            "memory_bytes_per_gpu": round(cluster.memory_bytes),
            "rates": {
                name: {
                    "value": getattr(rates, name),
                    "spread": rates.spread.get(name),
                    "from": rates.provenance.get(name),
                }
                for name in constants()
            },
            "mfu_definition": MFU,
            "considered": found.considered,
            "fits": found.fits,
            "too_large": found.too_large,
            "refused": dict(found.refused),
            "layouts": [record(candidate, question, price) for candidate in found.fitting[:shown]],
            "near_misses": [
                {**record(candidate, question, price), "why_not": why_not(candidate, question).strip()}
                for candidate in found.near_misses[:shown]
            ],
            "notes": list(notes),
        },
        indent=1,
    )


def to_yaml(config: RunConfig, preset: str | None, header: Sequence[str]) -> str:
    """A configuration as YAML with the values that differ from the preset's or the defaults."""
    from megatron_slm.config.load import load

    base = load(None, [f"preset={preset}"] if preset else []).config
    lines = [*(f"# {line}" for line in header)]
    if preset:
        lines.append(f"preset: {preset}")
    section = ""
    for key in all_keys():
        own = value_of(config, key)
        if key == "preset" or "." not in key or own == value_of(base, key):
            continue
        name, _, field = key.partition(".")
        if name != section:
            lines += ["", f"{name}:"]
            section = name
        lines.append(f"  {field}: {show(own)}")
    return "\n".join(lines) + "\n"


def _layout_keys() -> list[str]:
    sizes = ("tensor_model", "pipeline_model", "virtual_pipeline_model", "context", "expert_model", "expert_tensor")
    keys = ["parallel.world_size", *(f"parallel.{size}_parallel_size" for size in sizes)]
    keys.append("parallel.sequence_parallel")
    keys += [f"parallel.account_for_{part}_in_pipeline_split" for part in ("embedding", "loss")]
    train = ("micro_batch_size", "global_batch_size", *(f"recompute_{what}" for what in _RECOMPUTE))
    return [*keys, *(f"train.{key}" for key in train)]


_RECOMPUTE = ("granularity", "method", "num_layers", "modules")


def _refusals(found: Found) -> str:
    if not found.refused:
        return ""
    return " (" + ", ".join(f"{name} {count}" for name, count in found.refused.most_common(3)) + ")"


def _heading(price: float | None) -> str:
    return _HEAD + ("" if price is None else "  cost/1e9 tokens")


def _row(candidate: Candidate, price: float | None) -> str:
    parallel, prediction, memory = candidate.config.parallel, candidate.prediction, candidate.memory
    sizes = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.vpp_size,
        parallel.context_parallel_size,
        parallel.expert_model_parallel_size,
        parallel.expert_tp_size if candidate.config.model.num_moe_experts else 1,
        candidate.config.train.micro_batch_size,
    )
    widths = (2, 2, 3, 2, 2, 3, 3)
    layout = " ".join(f"{size:>{width}}" for size, width in zip(sizes, widths, strict=True))
    line = (
        f"{layout} {recomputed(candidate.config):<9} {'y' if parallel.sequence_parallel else 'n':>2} | "
        f"{prediction.step_seconds:6.3f} {prediction.tokens_per_second_per_gpu:10.0f} {100 * prediction.mfu:6.1f}  "
        f"{memory.low / GIB:7.1f}-{memory.high / GIB:<6.1f} {candidate.verdict:<5} | "
        f"{100 * prediction.bubble_share:8.1f} {prediction.exposed_seconds:9.3f}"
    )
    return line if price is None else f"{line} {cost_per_billion_tokens(candidate, price):16,.0f}"


def _traffic_lines(candidate: Candidate, question: Question) -> list[str]:
    """What the first rank of the fastest layout sends."""
    entries = traffic(Question(candidate.config, question.cluster, question.rates, question.kernels))
    links = by_link(entries)
    lines = [
        f"the fastest one sends {links.inside / 1e9:.1f} GB a step and rank inside its node, "
        f"{links.between / 1e9:.1f} GB between nodes (first rank of the first stage):"
    ]
    for entry in entries:
        lines.append(
            f"  {entry.axis:<6} {entry.collective:<14} {entry.times:>7} x   {entry.sent.inside / 1e9:9.2f} GB inside "
            f"{entry.sent.between / 1e9:9.2f} GB between"
        )
    return lines
