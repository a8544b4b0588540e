"""pass@k, calibration and intervals against the same things counted one by one."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.evaluate.statistics import MIN_ITEMS, brier, paired_bootstrap, pass_at_k, reliability


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (7, 3, 5), (4, 1, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(n: int, c: int, k: int) -> None:
    passed = [True] * c + [False] * (n - c)
    subsets = list(itertools.combinations(passed, k))
    expected = sum(any(one) for one in subsets) / len(subsets)
    assert pass_at_k(np.array([n]), np.array([c]), k)[0] == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_of_many_samples_and_of_too_few() -> None:
    found = pass_at_k(np.array([1000, 1000]), np.array([0, 1000]), 100)
    assert found.tolist() == [0.0, 1.0]
    assert pass_at_k(np.array([1000]), np.array([5]), 100)[0] == pytest.approx(0.4102, abs=1e-3)
    with pytest.raises(AssertionError, match="needs 3 samples"):
        pass_at_k(np.array([2]), np.array([1]), 3)


def test_the_calibration_error_by_hand() -> None:
    confidence = np.array([0.95, 0.85, 0.1, 0.2, 1.0])
    correct = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    found = reliability(confidence, correct, bins=5)
    # bins: (0, .2] holds .1 and .2; (.8, 1] the others
    assert found.counts.tolist() == [2.0, 0.0, 0.0, 0.0, 3.0]
    expected = (2 * abs(0.15 - 0.5) + 3 * abs(2.8 / 3 - 2 / 3)) / 5
    assert found.error == pytest.approx(expected)
    assert math.isnan(reliability(np.empty(0), np.empty(0)).error)


def test_calibrated_confidence_has_a_small_error_and_overconfidence_a_large_one() -> None:
    random = np.random.default_rng(0)
    confidence = random.uniform(0.3, 1.0, 20_000)
    correct = (random.uniform(size=20_000) < confidence).astype(float)
    assert reliability(confidence, correct).error < 0.02
    assert reliability(np.sqrt(confidence), correct).error > 0.1


def test_brier() -> None:
    found = brier(np.array([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0]]), np.array([0, 0]))
    assert found == pytest.approx([0.09 + 0.04 + 0.01, 2.0])


def test_the_bootstrap_is_that_of_a_loop() -> None:
    random = np.random.default_rng(3)
    first, second, weights = random.normal(size=(2, 12)).tolist() + [random.uniform(1.0, 9.0, 12).tolist()]
    found = paired_bootstrap(np.array(first), np.array(second), np.array(weights), resamples=500, seed=7)
    drawn = np.random.default_rng(7).integers(0, 12, (500, 12))
    differences = []
    for places in drawn:
        total = sum(weights[at] for at in places)
        differences.append(sum(second[at] - first[at] for at in places) / total)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])), rel=1e-12)
    assert found.first == pytest.approx(sum(first) / sum(weights))
    assert found.difference == pytest.approx((sum(second) - sum(first)) / sum(weights))
    assert found.detectable == pytest.approx(2.8016 * np.std(differences, ddof=1), rel=1e-4)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of 200 pairs of models without a difference few look different; a difference that is detectable is found."""
    random = np.random.default_rng(1)
    wrong = found = 0
    for trial in range(200):
        noise = random.normal(size=(2, 60))
        wrong += paired_bootstrap(noise[0], noise[1], resamples=400, seed=trial).real
        one = paired_bootstrap(noise[0], noise[1] + 2.8 * math.sqrt(2 / 60), resamples=400, seed=trial)
        found += one.real
    assert wrong <= 20 and 140 <= found <= 180


def test_the_seed_decides() -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 30))
    one, again, other = (paired_bootstrap(first, second, resamples=300, seed=seed) for seed in (1, 1, 2))
    assert one == again and one != other


def test_few_items_say_nothing_and_equal_ones_no_difference() -> None:
    few = paired_bootstrap(np.zeros(MIN_ITEMS - 1), np.ones(MIN_ITEMS - 1))
    assert (few.low, few.high) == (1.0, 1.0) and not few.real
    assert paired_bootstrap(np.zeros(MIN_ITEMS), np.ones(MIN_ITEMS)).real
    same = paired_bootstrap(np.ones(50), np.ones(50))
    assert not same.real and math.isnan(same.detectable)


def test_two_results_are_compared_without_torch(tmp_path: Path) -> None:
    item = {"values": {"passed": 1, "samples": 1, "score": 1.0}}
    task = {"name": "t", "kind": "generation", "digest": "d", "items": [item] * 20}
    result = {"result_version": 1, "model": "m", "tokenizer_hash": "h", "settings": {}, "tasks": [task]}
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    program = (
        "import sys; from megatron_slm.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(9 if {'torch', 'megatron'} & set(sys.modules) else code)"
    )
    command = [sys.executable, "-c", program, "eval", "compare", str(path), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "no real difference" in done.stdout, (done.returncode, done.stderr)
