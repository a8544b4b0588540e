"""A resumed run is the same run: N steps straight equal k steps, a stop, and N - k steps, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_slm.train.run_directory import RunDirectory, locked
from tests import runs
from tests.breadth import BREADTH, widely
from tests.ranks import RankFailure

SCHEDULES = {
    "cosine": ("schedule.lr_decay_style=cosine", "schedule.lr_warmup_iters=2"),
    "linear": ("schedule.lr_decay_style=linear",),
    "inverse-square-root": ("schedule.lr_decay_style=inverse-square-root", "schedule.lr_warmup_iters=2"),
    "wsd": ("schedule.lr_decay_style=WSD", "schedule.lr_wsd_decay_iters=3", "schedule.lr_warmup_iters=1"),
    "constant": ("schedule.lr_decay_style=constant",),
}
TP2_PP2 = (
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.sequence_parallel=true",
)
N, K = 6, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


def check_bitwise(tmp_path: Path, data: Path, world_size: int, *overrides: str) -> None:
    """Straight and resumed runs agree in losses, parameters, optimizer, random states and cursor."""
    iters = f"train.train_iters={N}"
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert runs.train(straight, data, world_size, iters, *overrides) == 0
    assert runs.train(resumed, data, world_size, iters, f"train.exit_interval={K}", *overrides) == 75
    assert sorted(runs.losses(resumed)) == list(range(1, K + 1))
    assert runs.train(resumed, data, world_size, iters, *overrides) == 0
    assert runs.losses(straight) == runs.losses(resumed)
    assert len(set(runs.losses(straight).values())) == N, "losses must change from step to step to compare anything"
    first, second = (runs.contents(runs.checkpoint_path(run, N)) for run in (straight, resumed))
    assert any(key.startswith("optimizer.state.exp_avg_sq") for key in first)
    assert runs.differences(first, second) == []


@pytest.mark.parametrize("schedule", widely(SCHEDULES, "wsd"))
def test_resume_is_bitwise_under_every_schedule(tmp_path: Path, data: Path, schedule: str) -> None:
    check_bitwise(tmp_path, data, 2, *SCHEDULES[schedule], "parallel.tensor_model_parallel_size=2")


def test_resume_is_bitwise_with_pipeline_sequence_parallelism_and_dropout(tmp_path: Path, data: Path) -> None:
    """Dropout makes the random states matter, recompute reads them twice."""
    dropout = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1", "train.recompute_granularity=selective")
    check_bitwise(tmp_path, data, 4, *TP2_PP2, *dropout)


def test_resume_is_bitwise_in_bf16_with_interleaving_and_data_parallelism(tmp_path: Path, data: Path) -> None:
    degrees = ("parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2")
    check_bitwise(tmp_path, data, 4, *degrees, "precision.bf16=true", "parallel.overlap_param_gather=true")


def test_resume_is_bitwise_without_the_distributed_optimizer(tmp_path: Path, data: Path) -> None:
    check_bitwise(tmp_path, data, 2, "parallel.use_distributed_optimizer=false", "precision.bf16=true")


GPT2_LIKE = (
    "model.position_embedding_type=learned_absolute",
    "model.normalization=LayerNorm",
    "model.swiglu=false",
    "model.add_bias_linear=true",
    "model.untie_embeddings_and_output_weights=false",
)
PADDED = {
    "several-buckets": (2, ("parallel.ddp_bucket_size=5000",)),
    "tied-pp2": (2, ("parallel.pipeline_model_parallel_size=2", *GPT2_LIKE)),
    "dp3": (3, ("train.global_batch_size=6", "parallel.ddp_bucket_size=5000")),
}


@pytest.mark.parametrize("case", widely(PADDED, "tied-pp2"))
def test_resume_is_bitwise_where_buckets_are_padded(tmp_path: Path, data: Path, case: str) -> None:
    """Core 0.16.1 shifts the saved moments behind a padded bucket; see ``optimizer_shards``."""
    world_size, overrides = PADDED[case]
    check_bitwise(tmp_path, data, world_size, *overrides)


LAYOUTS = {
    "tp2-pp2": (4, TP2_PP2),
    "one": (1, ()),
    "dp2": (2, ()),
    "pp2-vpp2": (
        2,
        ("parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"),
    ),
}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tp2-pp2", "one"),
        pytest.param("one", "tp2-pp2", marks=BREADTH),
        pytest.param("dp2", "pp2-vpp2", marks=BREADTH),
        ("pp2-vpp2", "dp2"),
    ],
)
def test_resume_under_another_layout_continues_the_same_run(
    tmp_path: Path, data: Path, before: str, after: str
) -> None:
    """Losses of the steps after the change agree with the straight run within fp32 reassociation."""
    iters = f"train.train_iters={N}"
    (world, degrees), (new_world, new_degrees) = LAYOUTS[before], LAYOUTS[after]
    assert runs.train(tmp_path / "straight", data, world, iters, *degrees) == 0
    assert runs.train(tmp_path / "moved", data, world, iters, f"train.exit_interval={K}", *degrees) == 75
    assert runs.train(tmp_path / "moved", data, new_world, iters, *new_degrees) == 0
    straight, moved = ([r["lm_loss"] for r in runs.records(tmp_path / name)] for name in ("straight", "moved"))
    assert moved == pytest.approx(straight, rel=1e-5)
    digests = [[r["sample_digest"] for r in runs.records(tmp_path / name)] for name in ("straight", "moved")]
    assert digests[0] == digests[1]


def test_weights_only_start_from_another_run(tmp_path: Path, data: Path) -> None:
    source = tmp_path / "source"
    assert runs.train(source, data, 2, "train.train_iters=4", "parallel.tensor_model_parallel_size=2") == 0
    start = f"checkpoint.pretrained_checkpoint={source}"
    assert runs.train(tmp_path / "tuned", data, 1, "train.train_iters=0", start, "train.seed=7") == 0
    tuned, origin = (
        runs.contents(runs.checkpoint_path(run, step)) for run, step in ((tmp_path / "tuned", 0), (source, 4))
    )
    weights = [key for key in origin if not key.startswith(("optimizer", "random", "common", "state"))]
    assert len(weights) > 5 and runs.differences({k: origin[k] for k in weights}, {k: tuned[k] for k in weights}) == []
    assert tuned["optimizer.state.exp_avg.output_layer.weight"].count_nonzero() == 0
    assert tuned["state"]["step"] == 0
    masters = "optimizer.state.param.output_layer.weight"
    assert tuned[masters].equal(origin[masters])


def test_a_changed_learning_rate_is_obeyed_on_resume(tmp_path: Path, data: Path) -> None:
    """Core would take the rate of the checkpoint."""
    run = tmp_path / "run"
    style = "schedule.lr_decay_style=constant"
    assert runs.train(run, data, 1, "train.train_iters=2", style, "optimizer.lr=1e-3") == 0
    assert runs.train(run, data, 1, "train.train_iters=3", style, "optimizer.lr=5e-4") == 0
    assert [record["learning_rate"] for record in runs.records(run)] == [1e-3, 1e-3, 5e-4]


def test_another_seed_model_or_corpus_is_refused_by_name(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    assert runs.train(run, data, 1, "train.train_iters=2") == 0
    before = sorted(path.name for path in run.rglob("*"))
    for change, named in (("train.seed=9", "seed"), ("model.hidden_size=64", "hidden_size")):
        with pytest.raises(RankFailure, match=named) as failure:
            runs.train(run, data, 1, "train.train_iters=3", change)
        assert failure.value.code == 2 and "--fresh" in str(failure.value)
    assert sorted(path.name for path in run.rglob("*")) == before
    assert runs.train(run, data, 1, "train.train_iters=1", "train.seed=9", fresh=True) == 0
    assert (tmp_path / "run.1" / "metrics.jsonl").exists()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_refused_in_one_sentence(tmp_path: Path, data: Path, damage: str) -> None:
    run = tmp_path / "run"
    assert runs.train(run, data, 1, "train.train_iters=2") == 0
    victim = next(runs.checkpoint_path(run, 2).glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(content[:-10])
    else:
        victim.unlink()
    with pytest.raises(RankFailure, match=victim.name) as failure:
        runs.train(run, data, 1, "train.train_iters=3")
    assert failure.value.code == 2 and "Traceback" not in str(failure.value)


def test_a_run_that_turns_nan_stops_and_saves_nothing_of_it(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    wild = ("optimizer.lr=1e30", "optimizer.clip_grad=0", "schedule.lr_decay_style=constant", "train.train_iters=20")
    with pytest.raises(RankFailure, match=r"step \d+: the loss is .*, the gradient norm (nan|inf)") as failure:
        runs.train(run, data, 2, *wild, "checkpoint.save_interval=1")
    assert failure.value.code == 1 and "Traceback" not in str(failure.value)
    saved = int((run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert saved == max(runs.losses(run)) < 20
    contents = runs.contents(runs.checkpoint_path(run, saved))
    assert contents["state"]["step"] == saved


def test_a_name_in_use_is_refused(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    with locked(RunDirectory(run)), pytest.raises(RankFailure, match="in use by another job") as failure:
        runs.train(run, data, 1, "train.train_iters=1")
    assert failure.value.code == 2 and not run.exists()
    assert runs.train(run, data, 1, "train.train_iters=1") == 0


def test_weights_of_another_model_are_refused_before_anything_is_written(tmp_path: Path, data: Path) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    assert runs.train(source, data, 1, "train.train_iters=1") == 0
    start = f"checkpoint.pretrained_checkpoint={source}"
    with pytest.raises(RankFailure, match="model.hidden_size: 32 there, 64 here") as failure:
        runs.train(run, data, 1, "train.train_iters=1", start, "model.hidden_size=64")
    assert failure.value.code == 2 and not run.exists()


def test_a_refused_resume_leaves_the_records_alone(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    assert runs.train(run, data, 1, "train.train_iters=1") == 0
    config = (run / "config.yaml").read_text()
    victim = next(runs.checkpoint_path(run, 1).glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(RankFailure, match=victim.name):
        runs.train(run, data, 1, "train.train_iters=2", "optimizer.lr=1")
    assert (run / "config.yaml").read_text() == config and not list(run.glob("config.yaml.*"))


def test_a_default_spelled_out_is_still_the_same_run(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    assert runs.train(run, data, 1, "train.train_iters=1") == 0
    spelled = ("model.vocab_size=512", "model.ffn_hidden_size=128", "data.data_seed=1234", "model.kv_channels=8")
    assert runs.train(run, data, 1, "train.train_iters=2", *spelled) == 0
