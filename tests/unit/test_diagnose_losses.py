"""``mslm diagnose`` on small models that are really trained: noisy least squares by SGD, sound ones and sick ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.diagnose.records import Records
from megatron_slm.diagnose.rules import diagnose

STEPS, SIZE, BATCH = 160, 12, 16

Rate = Callable[[int], float]


def trained(
    seed: int,
    rate: Rate,
    *,
    steps: int = STEPS,
    noise: float = 0.3,
    heavy: bool = False,
    bad_step: int | None = None,
    floor: float = 1.0,
) -> list[dict[str, Any]]:
    """Records of SGD on a linear model [SIZE]: the loss of a batch is its mean squared error plus ``floor``.

    Args:
        rate: of a step.
        heavy: noise of the targets with eight degrees of freedom instead of normal.
        bad_step: its targets are a hundred times too large.
    """
    random = np.random.default_rng(seed)
    truth, weights = random.normal(size=SIZE), np.zeros(SIZE)
    records = []
    for step in range(1, steps + 1):
        inputs = random.normal(size=(BATCH, SIZE))
        drawn = random.standard_t(8, BATCH) if heavy else random.normal(size=BATCH)
        targets = inputs @ truth + noise * drawn
        if step == bad_step:
            targets = targets * 100.0
        errors = inputs @ weights - targets
        gradient = 2.0 * inputs.T @ errors / BATCH
        loss, norm = float(np.mean(errors**2)) + floor, float(np.linalg.norm(gradient))
        # Clipped at 10, as a run would be.
        weights = weights - rate(step) * gradient * min(1.0, 10.0 / norm)
        records.append({"step": step, "lm_loss": loss, "grad_norm": norm, "learning_rate": rate(step)})
    return records


def constant(rate: float) -> Rate:
    return lambda step: rate


def cosine(rate: float) -> Rate:
    return lambda step: rate * 0.5 * (1.0 + np.cos(np.pi * (step - 1) / STEPS))


def found(steps: Sequence[Mapping[str, Any]], **others: Any) -> dict[str, Any]:
    """Findings by name."""
    config = {"stage": "pretrain", "optimizer": {"clip_grad": 10.0}}
    records = Records(Path("run"), config, steps, **others)
    return {finding.name: finding for finding in diagnose(records).findings}


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("rate", [constant(0.02), constant(0.05), cosine(0.05), cosine(0.01)])
def test_sound_runs_have_nothing(rate: Rate, heavy: bool) -> None:
    alarms = {seed: names for seed in range(50) if (names := set(found(trained(seed, rate, heavy=heavy))))}
    # Batches of heavy noise really jump now and then: that, and nothing else, may be named.
    assert all(heavy and names == {"spike"} for names in alarms.values()), alarms
    assert len(alarms) <= 3


@pytest.mark.parametrize("seed", range(3))
def test_a_rate_that_is_too_high_diverges(seed: int) -> None:
    names = found(trained(seed, constant(2.0)))
    assert "divergence" in names and "late-instability" not in names
    assert names["divergence"].step <= 10 and "learning rate 2" in " ".join(names["divergence"].evidence)


@pytest.mark.parametrize("seed", range(3))
def test_a_rate_that_was_raised_loses_what_was_learned(seed: int) -> None:
    names = found(trained(seed, lambda step: 0.05 if step < 100 else 1.5))
    assert set(names) == {"divergence"}
    assert 50 < names["divergence"].step <= 110


def test_a_loss_that_is_not_finite_is_a_divergence() -> None:
    steps = trained(0, constant(0.05), steps=10)
    steps[-1]["lm_loss"] = None
    assert found(steps)["divergence"].step == 10
    steps[-1] |= {"skipped": True}
    assert set(found(steps)) == {"spike"}
    stopped = found(steps[:9], errors=["step 10: the loss is nan, the gradient norm nan (learning rate 0.05)."])
    assert stopped["divergence"].step == 10


@pytest.mark.parametrize("seed", range(3))
def test_a_bad_batch_is_a_spike_at_its_step(seed: int) -> None:
    names = found(trained(seed, constant(0.02), bad_step=90))
    assert set(names) == {"spike"} and names["spike"].step == 90


@pytest.mark.parametrize("seed", range(3))
def test_a_rate_that_creeps_up_is_a_late_instability(seed: int) -> None:
    names = found(trained(seed, lambda step: 0.02 if step < 100 else 0.6, noise=0.1))
    assert set(names) == {"late-instability"}
    assert names["late-instability"].step > 60


@pytest.mark.parametrize("rate", [0.0, 1e-7])
def test_a_rate_of_nothing_is_a_plateau(rate: float) -> None:
    names = found(trained(0, constant(rate)))
    assert set(names) == {"plateau"}
    assert ("the learning rate is 0" in names["plateau"].causes[0]) == (rate == 0.0)


def test_a_schedule_that_ends_too_early_is_a_plateau() -> None:
    names = found(trained(0, lambda step: 0.05 if step < 60 else 0.0))
    assert set(names) == {"plateau"} and names["plateau"].step == 60


def test_data_without_anything_to_learn_is_a_plateau() -> None:
    names = found(trained(0, constant(0.05), noise=0.0, floor=0.0))
    assert set(names) == {"plateau"} and "nothing left to predict" in names["plateau"].evidence[-1]


def test_held_out_loss_that_still_falls_contradicts_an_instability() -> None:
    steps = trained(1, lambda step: 0.02 if step < 100 else 0.6, noise=0.1)
    falls = [{"step": step, "lm_loss": 3.0 - step / 100} for step in (40, 80, 120, 160)]
    assert set(found(steps)) == {"late-instability"} and not found(steps, validations=falls)


def layers(norms: Sequence[float], sizes: Sequence[float], step: int) -> dict[str, Any]:
    """A measurement of a model of which every layer has a norm and a size."""
    names = ["embedding", *(f"layer_{at}" for at in range(len(norms))), "output_layer"]
    return {
        "step": step,
        "grad_norm": dict(zip(names, [1.0, *norms, 1.0], strict=True)),
        "activation_rms": dict(zip(names, [0.02, *sizes], strict=False)),
    }


def network(seed: int, width: float, depth: int = 6) -> tuple[list[float], list[float]]:
    """(gradient norms, output RMS) of the layers of a tanh network [64] whose weights have the deviation ``width``."""
    random = np.random.default_rng(seed)
    matrices = [width * random.normal(size=(64, 64)) for _ in range(depth)]
    inputs = [random.normal(size=(32, 64))]
    for matrix in matrices:
        inputs.append(np.tanh(inputs[-1] @ matrix))
    back, norms = random.normal(size=(32, 64)), []
    for matrix, given, put_out in zip(matrices[::-1], inputs[-2::-1], inputs[::-1], strict=False):
        back = back * (1.0 - put_out**2)
        norms.insert(0, float(np.linalg.norm(given.T @ back)))
        back = back @ matrix.T
    return norms, [float(np.sqrt(np.mean(each**2))) for each in inputs[1:]]


def test_layers_without_gradient_are_named() -> None:
    steps = trained(0, constant(0.05))
    sound = [layers(*network(step, 0.12), step) for step in range(10, 60, 10)]
    assert not found(steps, dynamics=sound)
    dead = [layers(*network(step, 0.005), step) for step in range(10, 60, 10)]
    names = found(steps, dynamics=dead)
    assert set(names) == {"dead-gradients"} and "layer_0" in names["dead-gradients"].evidence[0]
    assert not found(steps, dynamics=[*sound, dead[0]]), "a layer may be quiet once"


def test_layers_that_put_out_too_much_are_saturated() -> None:
    sizes = [400.0 * (at + 1) for at in range(4)]
    steps = trained(0, constant(0.05))
    names = found(steps, dynamics=[layers([1.0] * 4, sizes, step) for step in range(10, 60, 10)])
    assert names["dead-gradients"].summary == "layers are saturated"


def test_a_run_behind_another_is_named_with_what_differs() -> None:
    slow = trained(0, constant(0.001), noise=1.0)
    other = Records(Path("good"), {"optimizer": {"lr": 0.05}}, trained(0, constant(0.05), noise=1.0))
    names = found(slow, against=other)
    assert set(names) == {"behind"} and "optimizer.lr: None here, 0.05 there" in names["behind"].evidence
    assert not found(trained(1, constant(0.05), noise=1.0), against=other)


@pytest.mark.parametrize(("end", "name"), [(3.0, "late-instability"), (4.5, "divergence")])
def test_how_much_of_the_gain_is_lost_tells_an_instability_from_a_divergence(end: float, name: str) -> None:
    """A curve made up: from 5 to 2, then up to ``end``."""
    random = np.random.default_rng(0)
    curve = np.concatenate([np.linspace(5.0, 2.0, 80), np.linspace(2.0, end, 80)]) + 0.05 * random.normal(size=160)
    steps = [{"step": at, "lm_loss": float(loss)} for at, loss in enumerate(curve, start=1)]
    assert set(found(steps)) == {name}
    assert 70 <= found(steps)[name].step <= 100
