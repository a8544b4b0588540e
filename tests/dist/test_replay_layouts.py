"""Two layouts of one run: equal within measured rounding, and a parallelism bug named with its module."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from megatron_slm import cli
from megatron_slm.config.load import Resolved
from megatron_slm.errors import ConfigError
from megatron_slm.replay.layout_report import LayoutDifference
from megatron_slm.replay.layouts import layout_diff
from megatron_slm.verify.tolerance import Unit
from megatron_slm.verify.witnessed import origins
from tests import parallel_bugs as bugs, runs
from tests.breadth import widely
from tests.layout_bugs import BUGS, job_of, parameter_not_gathered

STEPS = ("train.train_iters=2", "train.eval_iters=0", "checkpoint.save_interval=1")
ALONE = ("parallel.world_size=1", "replay.whole_steps=2")
TP2 = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run on one rank and on two; comparing them has made the first one again from perturbed weights."""
    place = tmp_path_factory.mktemp("layouts")
    assert runs.train(place / "one", runs.corpus(place), 1, *ALONE, *STEPS) == 0
    assert runs.train(place / "two", runs.corpus(place), 2, *TP2, *STEPS) == 0
    with (place / "shown").open("w") as shown, contextlib.redirect_stdout(shown):
        assert cli.main(["replay", "layout-diff", str(place / "one"), str(place / "two")]) == 0
    return place


def compared(
    place: Path, other: str, at: int | None = None, plant: Callable[[], None] | None = None
) -> LayoutDifference:
    """The run on one rank against another one; with ``plant`` the latter's first steps are looked into."""

    def reference(steps: Sequence[int]) -> Path:
        return place / "one-layout-diff" / "perturbed"

    def start(resolved: Resolved) -> int:
        return runs.start(resolved, plant if resolved.config.name == "second" else None)

    two = (place / "one", place / other)
    locate = partial(origins, start=start) if plant is not None else None
    return layout_diff(two, reference, lambda unit: Unit(unit).tolerance, at=at, locate=locate)


def test_two_tensor_parallel_ranks_are_equal_within_tolerance(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = place / "one-layout-diff"
    start, moved = runs.contents(made / "initial" / "checkpoints" / "iter_0000001"), runs.contents(made / "moved")
    name = "decoder.layers.mlp.linear_fc1.weight"
    away = (moved[name] - start[name]).abs() / start[name].abs()
    assert float(away.min()) > 0.0 and float(away.max()) < 2.0**-22, "each weight by one unit in the last place"
    assert runs.losses(place / "one") != runs.losses(place / "two"), "not to the last bit"
    expected = "equal within tolerance: 1 rank against tp2; losses and gradient norms of steps 1 to 2, 108 tensors"
    assert (place / "shown").read_text().startswith(expected), "nothing of what the runs print"
    command = ["replay", "layout-diff", str(place / "one"), str(place / "two")]
    assert cli.main([*command, "--reference", str(made / "perturbed"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["equal"] and told["steps"] == [1, 2] and told["worst"] is None and not told["settings"]
    assert 0.0 < told["largest"] < 1.0
    assert told["compared"] == 4 * (3 + 4 * 6), "every layer's tensors count for themselves"
    with pytest.raises(ConfigError, match=r"the checkpoints of steps \[1, 2\] in common"):
        compared(place, "two", at=3)


def test_other_models_are_refused_before_anything_is_made_again(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shallow = ("model.num_layers=2", "train.train_iters=1", "parallel.world_size=1")
    assert runs.train(place / "shallow", runs.corpus(place), 1, *STEPS, *shallow) == 0
    assert cli.main(["replay", "layout-diff", str(place / "shallow"), str(place / "two")]) == 2
    said = capsys.readouterr().err
    assert "are not one configuration under two layouts" in said and "model.num_layers: 2 and 4" in said
    assert not (place / "shallow-layout-diff").exists()


def test_gradients_of_norms_that_are_not_summed_are_flagged(place: Path) -> None:
    planted = bugs.norm_gradients_not_summed
    assert runs.train(place / "unsummed", runs.corpus(place), 2, *TP2, *STEPS, plant=planted) == 0
    found = compared(place, "unsummed", plant=planted)
    assert not found.equal and found.worst is not None and found.tensors[0].step == 1
    assert found.worst.module.endswith("norm") and found.worst.ratio > 100.0
    assert not found.displaced and found.loss_parted != 1, "the forward pass of step 1 is right"
    assert "the forward pass" not in found.render(), "the origin says more"
    told_less = replace(found, origins=()).render()
    assert "the forward pass seems right" in told_less and f"its module     {found.worst.module}" in told_less
    (origin,) = found.origins
    assert (origin.step, origin.module, origin.what) == (1, "decoder.final_layernorm", "gradient")
    assert origin.run == 1 and origin.repeated and "tp2, step 1: decoder.final_layernorm (gradient)" in found.render()
    told = json.loads(found.to_json())
    assert told["origins"][0]["module"] == origin.module
    assert told["worst"]["module"] == found.worst.module and told["equal"] is False


@pytest.mark.parametrize(
    "name", widely(["parameter not gathered", "rotary positions of another cut"], "parameter not gathered")
)
def test_a_bug_is_located_in_steps_that_the_run_has_kept_itself(place: Path, name: str) -> None:
    fault = BUGS[name]
    job, other = job_of(fault.values), name.replace(" ", "-")
    kept = (*STEPS, "replay.whole_steps=2")
    assert runs.train(place / other, runs.corpus(place), 2, *job.layout, *kept, plant=fault.plant) == 0
    found = compared(place, other, plant=fault.plant)
    (origin,) = found.origins
    assert fault.is_named_by(origin.module, origin.what), origin
    if fault.plant is parameter_not_gathered:
        assert (origin.step, origin.what) == (2, "copies") and "rank 1" in origin.detail
    else:
        assert (origin.step, origin.what) == (1, "forward") and found.loss_parted is None, "too little to be seen there"
    again = {path.name for path in (place / "one-layout-diff" / "first-steps").iterdir()}
    assert "second" not in again, "its steps are there already"


def test_swapped_shards_and_other_data_are_flagged(place: Path) -> None:
    planted = bugs.shards_of_two_ranks_swapped
    assert runs.train(place / "swapped", runs.corpus(place), 2, *TP2, *STEPS, plant=planted) == 0
    found = compared(place, "swapped", at=1)
    assert not found.equal and found.loss_parted == 1
    assert {one.module for one in found.displaced} == {
        f"decoder.layers.{n}.self_attention.linear_qkv" for n in range(4)
    }
    assert found.worst in found.displaced and "it was other from the start" in found.render()
    metrics = place / "swapped" / "metrics.jsonl"
    records = [{**record, "sample_digest": "other"} for record in runs.records(place / "swapped")]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = runs.checkpoint_path(place / "swapped", 2) / "config.yaml"
    config.write_text(config.read_text().replace("seed: 1234", "seed: 4321"))
    found = compared(place, "swapped")
    assert found.samples == 1 and not found.tensors and "other samples from step 1 on" in found.render()
    assert "train.seed: 1234 and 4321" in found.settings and found.settings[0] in found.render()
