"""Whole runs over two sources: the same samples on any layout, through a stop and a change of shares."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from tests import runs
from tests.ranks import RankFailure

N, K = 6, 3
WEIGHTS = "data.weights=kjv=0.7,code=0.3"
CHANGE = "data.phases=20: kjv=0.25 code=0.75"  # Inside the third step of 8 samples.


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> str:
    from megatron_slm.data.prepare import prepare

    parent = tmp_path_factory.mktemp("sources")
    first = runs.corpus(parent)
    text = parent / "code.txt"
    text.write_text((Path(sysconfig.get_path("stdlib")) / "tokenize.py").read_text())
    prepare([text], parent / "code", tokenizer_model=first / "tokenizer" / "tokenizer.model")
    return f"data.sources=kjv={first},code={parent / 'code'}"


def train(run: Path, world_size: int, sources: str, *overrides: str, iters: int = N) -> int:
    return runs.train(
        run, Path("unused"), world_size, "data.data_path=null", sources, f"train.train_iters={iters}", *overrides
    )


def digests(run: Path) -> list[str]:
    return [record["sample_digest"] for record in runs.records(run)]


def test_a_mixture_is_the_same_run_on_other_layouts_and_through_a_stop(tmp_path: Path, sources: str) -> None:
    options = (WEIGHTS, CHANGE, "data.reset_attention_mask=true", "data.length_schedule=0: 8,20: 32")
    assert train(tmp_path / "straight", 1, sources, *options) == 0
    assert train(tmp_path / "stopped", 1, sources, *options, f"train.exit_interval={K}") == 75
    assert train(tmp_path / "stopped", 1, sources, *options) == 0
    assert runs.losses(tmp_path / "straight") == runs.losses(tmp_path / "stopped")
    first, second = (runs.contents(runs.checkpoint_path(tmp_path / name, N)) for name in ("straight", "stopped"))
    assert runs.differences(first, second) == []
    assert train(tmp_path / "dp2", 2, sources, *options) == 0
    assert digests(tmp_path / "dp2") == digests(tmp_path / "straight")
    losses = [[record["lm_loss"] for record in runs.records(tmp_path / name)] for name in ("straight", "dp2")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    cursor = first["state"]["cursor"]
    assert cursor["consumed_by_source"] == {"kjv": 14 + 7, "code": 6 + 21}
    log = (tmp_path / "straight" / "log.txt").read_text()
    assert "shares from sample 0 on: code 0.3, kjv 0.7" in log
    assert "shares from sample 20 on: code 0.75, kjv 0.25" in log


def test_a_change_of_shares_is_refused_for_the_past_and_logged_for_what_comes(tmp_path: Path, sources: str) -> None:
    run = tmp_path / "run"
    assert train(run, 1, sources, WEIGHTS, iters=K) == 0
    with pytest.raises(
        RankFailure, match=r'data\.weights=code=0\.3,kjv=0\.7 "data\.phases=24: code=0\.5 kjv=0\.5"'
    ) as failure:
        train(run, 1, sources, "data.weights=kjv=0.5,code=0.5")
    assert failure.value.code == 2 and "Traceback" not in str(failure.value)
    assert train(run, 1, sources, WEIGHTS, "data.phases=24: code=0.5 kjv=0.5") == 0
    assert "mixture changes at sample 24: kjv 0.7 -> 0.5, code 0.3 -> 0.5" in (run / "log.txt").read_text()
    state = json.loads((runs.checkpoint_path(run, N) / "state.json").read_text())
    assert state["cursor"]["consumed_by_source"] == {"kjv": 17 + 12, "code": 7 + 12}


def test_shares_that_follow_held_out_losses_survive_a_stop(tmp_path: Path, sources: str) -> None:
    options = ("data.weights=kjv=1,code=1", "data.loss_aware_strength=20", "train.eval_interval=2")
    assert train(tmp_path / "straight", 1, sources, *options) == 0
    assert train(tmp_path / "stopped", 1, sources, *options, f"train.exit_interval={K}") == 75
    assert train(tmp_path / "stopped", 1, sources, *options) == 0
    assert digests(tmp_path / "straight") == digests(tmp_path / "stopped")
    assert runs.losses(tmp_path / "straight") == runs.losses(tmp_path / "stopped")
    state = json.loads((runs.checkpoint_path(tmp_path / "stopped", N) / "state.json").read_text())
    adaptive = [phase for phase in state["cursor"]["phases"] if phase["adaptive"]]
    assert adaptive and all(phase["parts"]["kjv"] != phase["parts"]["code"] for phase in adaptive)
    log, validations = (tmp_path / "straight" / "log.txt").read_text(), tmp_path / "straight" / "validation.jsonl"
    decided = {record["consumed_samples"]: record["shares"] for record in map(json.loads, validations.open())}
    for phase in adaptive:
        assert decided[phase["start"]] == {
            name: part / sum(phase["parts"].values()) for name, part in phase["parts"].items()
        }
        assert f"shares from sample {phase['start']} on: code " in log
    assert "(by held-out loss; before: code 0.5, kjv 0.5)" in log


def test_a_source_may_join_an_existing_run_by_a_phase_and_other_words_name_the_way(
    tmp_path: Path, sources: str
) -> None:
    run, parts = tmp_path / "run", sources.removeprefix("data.sources=").split(",")
    before = f"data.sources={parts[0]}"
    schedule = ("data.reset_attention_mask=true", "data.length_schedule=0: 8")
    assert train(run, 1, before, *schedule, iters=1) == 0
    records = sorted(path.name for path in run.rglob("*"))
    with pytest.raises(RankFailure, match=r'with data\.weights=kjv=1 "data\.phases=8: code=') as failure:
        train(run, 1, sources, *schedule)
    assert failure.value.code == 2 and sorted(path.name for path in run.rglob("*")) == records
    with pytest.raises(RankFailure, match=r"(?s)dataset_digest.*add an entry of data\.phases such as '8: ") as failure:
        train(run, 1, f"data.sources={parts[1]}", *schedule)
    assert failure.value.code == 2 and sorted(path.name for path in run.rglob("*")) == records
    with pytest.raises(RankFailure, match="data.length_schedule: for the 8 samples read so far"):
        train(run, 1, before, schedule[0], "data.length_schedule=0: 16", iters=2)
    more = ("data.weights=kjv=1", "data.phases=8: kjv=1 code=1", schedule[0], "data.length_schedule=0: 8,8: 32")
    assert train(run, 1, sources, *more, iters=2) == 0
    assert runs.records(run)[-1]["consumed_by_source"] == {"kjv": 12, "code": 4}


def test_what_a_run_has_read_comes_again_in_another(tmp_path: Path, sources: str) -> None:
    assert train(tmp_path / "old", 1, sources, WEIGHTS, iters=K) == 0
    replayed = (f"data.replay_run={tmp_path / 'old'}", "data.replay_share=0.25")
    assert train(tmp_path / "new", 1, sources, WEIGHTS, *replayed, iters=K) == 0
    state = json.loads((runs.checkpoint_path(tmp_path / "new", K) / "state.json").read_text())
    assert state["cursor"]["consumed_by_source"]["replay"] == 6
    assert train(tmp_path / "old", 1, sources, WEIGHTS, iters=K + 1) == 0
    with pytest.raises(
        RankFailure, match=rf"set data\.replay_run={runs.checkpoint_path(tmp_path / 'old', K)},"
    ) as failure:
        train(tmp_path / "new", 1, sources, WEIGHTS, *replayed)
    assert failure.value.code == 2
    pinned = (f"data.replay_run={runs.checkpoint_path(tmp_path / 'old', K)}", "data.replay_share=0.25")
    assert train(tmp_path / "new", 1, sources, WEIGHTS, *pinned, iters=K + 1) == 0
