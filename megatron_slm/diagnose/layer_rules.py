"""Rules over the sizes of gradients and activations, layer by layer where they are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_slm.diagnose.finding import Finding
from megatron_slm.diagnose.records import FEWEST_STEPS, Records
from megatron_slm.diagnose.robust import median

DEAD_SHARE = 1e-3
"""Of the largest gradient norm of a part. Depth and residual connections spread healthy parts over up to two decades
(the output layer is the largest at the start); at three, clipping by the global norm leaves the others nothing."""
DEAD_NORM = 1e-7
"""A global norm in fp32: rounding of a sum of a million terms of size one is larger."""
SATURATED_RMS, SATURATED_GROWTH = 100.0, 3e3
"""Root mean square of what a layer puts out, and over that of the embedding. A residual stream grows by the root of
its layers, in trained models to some 10 and some hundred times the embedding; beyond both, what a norm passes back is
divided by thousands."""
PERSISTENT = 0.75
"""Of the measurements: a layer may be quiet once."""


def measured(records: Records) -> str:
    """What the rule needs: norms of layers, or else of the whole model."""
    if _layers(records) or not records.lacks("grad_norm"):
        return ""
    return f"needs log.layer_norms_interval, or {FEWEST_STEPS} steps with grad_norm"


def dead_gradients(records: Records) -> Finding | None:
    """Layers that get no gradient, or that put out so much that none comes through."""
    layers = _layers(records)
    evidence, step = [], records.steps[0]["step"]
    if dead := _persistent(layers, _dead):
        step = layers[0]["step"]
        evidence += [_sentence(layers, "grad_norm", part, "gradient norm") for part in dead[:4]]
        evidence.append(f"dead: {', '.join(dead)}; the largest norm of a part is {_largest(layers[-1]):.2g}")
    if saturated := _persistent(layers, _saturated):
        step = layers[0]["step"]
        evidence += [_sentence(layers, "activation_rms", part, "output RMS") for part in saturated[:4]]
        embedding = layers[-1]["activation_rms"]["embedding"]
        evidence.append(f"saturated: {', '.join(saturated)}; the embedding puts out {embedding:.3g}")
    norms = records.series("grad_norm")
    late = norms.values[len(norms.values) // 2 :]
    if len(norms.values) >= FEWEST_STEPS and median(late) < DEAD_NORM:
        step = next(step for step, value in zip(norms.steps, norms.values, strict=True) if value < DEAD_NORM)
        evidence.append(f"the gradient norm of the model has a median of {median(late):.2g} in the last half")
    if not evidence:
        return None
    return Finding(
        name="dead-gradients",
        summary="parts of the model get no gradient" if not saturated else "layers are saturated",
        step=step,
        evidence=tuple(evidence),
        causes=(
            "an initialisation that is too wide or too narrow (model.init_method_std)",
            "an update that was too large has driven the layers there: see divergence",
            "labels that are all masked, or a loss that does not reach these layers",
            "underflow of gradients in a low-precision format",
        ),
        intervention="Start anew with model.init_method_std=0.02 (or mup); if the run was sound before, go back to the "
        "newest checkpoint before that step with half the learning rate.",
    )


def _layers(records: Records) -> list[Mapping[str, Any]]:
    """Measurements of the layers."""
    return [record for record in records.dynamics if "grad_norm" in record and "activation_rms" in record]


def _persistent(layers: Sequence[Mapping[str, Any]], bad: Any) -> list[str]:
    """Parts that are bad in most measurements, in the order of the model."""
    if not layers:
        return []
    counts: dict[str, int] = {}
    for record in layers:
        for part in bad(record):
            counts[part] = counts.get(part, 0) + 1
    return [part for part in layers[-1]["grad_norm"] if counts.get(part, 0) >= PERSISTENT * len(layers)]


def _largest(record: Mapping[str, Any]) -> float:
    """The largest gradient norm of a part."""
    return max((value for value in record["grad_norm"].values() if value is not None), default=0.0)


def _dead(record: Mapping[str, Any]) -> list[str]:
    limit = max(DEAD_SHARE * _largest(record), DEAD_NORM)
    # The final norm has a vector of weights where the others have matrices.
    return [
        part
        for part, value in record["grad_norm"].items()
        if part != "final_norm" and value is not None and value < limit
    ]


def _saturated(record: Mapping[str, Any]) -> list[str]:
    sizes = record["activation_rms"]
    limit = max(SATURATED_RMS, SATURATED_GROWTH * (sizes.get("embedding") or 0.0))
    return [part for part, value in sizes.items() if part.startswith("layer_") and value is not None and value > limit]


def _sentence(layers: Sequence[Mapping[str, Any]], quantity: str, part: str, words: str) -> str:
    first, last = layers[0], layers[-1]
    return (
        f"{part}: {words} {first[quantity].get(part) or 0.0:.3g} at step {first['step']}, "
        f"{last[quantity].get(part) or 0.0:.3g} at step {last['step']}"
    )
