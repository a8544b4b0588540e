"""Recorded runs: equal runs leave equal bytes on every rank, a planted difference is one record and is named."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_slm import cli
from megatron_slm.replay import batches, stream
from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.cause import cause
from megatron_slm.replay.diff import first_divergence
from megatron_slm.replay.differing import megatron_traces
from megatron_slm.replay.stream import Flag, Frame, Phase
from tests import replay_plants as plants, runs
from tests.ranks import RankFailure

STEPS = 3
TRACE_FIELDS = {"schema_version", "event", "rank", "iteration", "microbatch", "phase", "name", "occurrence", "sequence",
    "fields"}  # fmt: skip
"""Of an event record of Megatron-LM's rank-local determinism traces, pull request 6610."""
RECORD = ("replay.level=layer", f"train.train_iters={STEPS}", "train.eval_iters=0", "replay.keep_batches=2")
DP4 = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", "precision.bf16=true")
TP2_PP2 = (
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.virtual_pipeline_model_parallel_size=2",
    "parallel.sequence_parallel=true",
    "train.recompute_granularity=full",
    "train.recompute_method=uniform",
    "train.recompute_num_layers=1",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def plain(folder: Path, data: Path) -> Path:
    """Four data-parallel ranks."""
    assert runs.train(folder / "plain", data, 4, *RECORD, *DP4) == 0
    return folder / "plain"


def files(run: Path) -> dict[str, bytes]:
    """Streams and names of every rank."""
    return {path.name: path.read_bytes() for path in sorted((run / "replay").glob("rank_*")) if path.is_file()}


def frame(run: Path, rank: int, step: int) -> Frame:
    """A rank's frame of a step."""
    frames = Capsule.of(run).frames(rank)
    return next(one for one in frames if one.step == step and Flag.START not in one.flags)


def differing(first: Path, second: Path, rank: int, step: int) -> list[tuple[Phase, str]]:
    """Phases and names of the records that differ, in their order."""
    names = Capsule.of(first).names(rank)
    pairs = zip(frame(first, rank, step).records, frame(second, rank, step).records, strict=True)
    return [(Phase(int(one["phase"])), names[one["name"]].split()[0]) for one, other in pairs if one != other]


def spoil_step_4() -> None:
    """The loss of step 4, which begins after 24 samples, is not finite."""
    from megatron_slm.data.loader import TrainLoader

    original = TrainLoader.micro_batches

    def spoiled(self: Any, cursor: Any, size: int) -> Any:
        for batch in original(self, cursor, size):
            if cursor.consumed_samples == 24:
                batch["loss_mask"][0, 0] = float("inf")
            yield batch

    TrainLoader.micro_batches = spoiled  # type: ignore[method-assign]


def test_equal_runs_leave_equal_bytes_on_data_parallel_ranks(plain: Path, folder: Path, data: Path) -> None:
    assert runs.train(folder / "again", data, 4, *RECORD, *DP4) == 0
    assert len(files(plain)) == 8 and files(folder / "again") == files(plain)
    assert first_divergence(Capsule.of(plain), Capsule.of(folder / "again")) is None
    assert cli.main(["replay", "diff", str(plain), str(folder / "again")]) == 0


def test_equal_runs_leave_equal_bytes_under_model_parallelism(folder: Path, data: Path) -> None:
    for name in ("tp2 pp2", "tp2 pp2 again"):
        assert runs.train(folder / name, data, 4, *RECORD, *TP2_PP2) == 0
    assert files(folder / "tp2 pp2") == files(folder / "tp2 pp2 again")
    for rank in range(4):
        records = frame(folder / "tp2 pp2", rank, 2).records
        names = Capsule.of(folder / "tp2 pp2").names(rank)
        noted = [(Phase(int(one["phase"])), names[one["name"]].split()[0], int(one["micro_batch"])) for one in records]
        assert len(set(noted)) == len(noted), "a recomputed pass is not noted again"
        outputs = [one[1:] for one in noted if one[0] is Phase.OUTPUT]
        gradients = [one[1:] for one in noted if one[0] is Phase.OUTPUT_GRADIENT]
        assert sorted(outputs) == sorted(gradients)
        layers = {name for name, _ in outputs if name.startswith("decoder.layers.") and name.count(".") == 2}
        assert len(layers) == 2 and {number for _, number in outputs} == set(range(8))
        assert any(one[0] is Phase.LOSS for one in noted) == (rank >= 2)
        phases = {one[0] for one in noted}
        assert phases >= {Phase.BATCH, Phase.RNG, Phase.GRADIENT, Phase.OPTIMIZER, Phase.PARAMETER, Phase.STEP}
    assert not any("overwritten" in name for rank in range(4) for name in Capsule.of(folder / "tp2 pp2").names(rank))


def test_recording_changes_no_number(plain: Path, folder: Path, data: Path) -> None:
    assert runs.train(folder / "silent", data, 4, *RECORD, *DP4, "replay.level=none") == 0
    assert runs.losses(folder / "silent") == runs.losses(plain)
    assert not (folder / "silent" / "replay").exists()


def test_one_flipped_bit_is_one_record_and_is_named(
    plain: Path, folder: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    struck = folder / "struck"
    assert runs.train(struck, data, 4, *RECORD, *DP4, plant=partial(plants.gradient_bit, 2, 0)) == 0
    assert [differing(plain, struck, rank, 1) for rank in range(4)] == [[]] * 4
    for rank in range(4):
        own = [name for phase, name in differing(plain, struck, rank, 2) if phase <= Phase.LOCAL_GRADIENT]
        assert own == ([plants.STRUCK] if rank == 2 else [])
    lines = folder / "differing.jsonl"
    assert cli.main(["replay", "diff", str(plain), str(struck), "--json", "--jsonl", str(lines)]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["step"], found["rank"], found["phase"]) == (2, 2, "local gradient")
    assert (found["tensor"], found["module"]) == (plants.STRUCK, plants.STRUCK.removesuffix(".weight"))
    assert found["inputs_equal"] is True and found["cause"] == "silent corruption"
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    first = next(line for line in written if line["rank"] == 2)
    assert (first["step"], first["phase"], first["tensor"]) == (2, "local gradient", plants.STRUCK)
    assert first["dtype"] == "float32" and first["first"] != first["second"] and len(first["second"]) == 32
    assert len(written) == sum(len(differing(plain, struck, rank, step)) for rank in range(4) for step in (2, 3))
    _require_megatron_traces(written)


def _require_megatron_traces(lines: list[dict[str, Any]]) -> None:
    """What a reader of Megatron-LM's traces demands of each of the two runs' records, and that each pair differs."""
    pairs = list(megatron_traces(lines))
    assert len(pairs) == len(lines) and all(one is None or one != other for one, other in pairs)
    for side in range(2):
        keys, last = set(), dict.fromkeys(range(4), -1)
        for record in filter(None, (pair[side] for pair in pairs)):
            assert record.keys() == TRACE_FIELDS and (record["schema_version"], record["event"]) == (1, "event")
            assert record["sequence"] > last[record["rank"]] and record["name"].isprintable()
            assert record["iteration"] >= 0 and (record["microbatch"] is None or record["microbatch"] >= 0)
            last[record["rank"]] = record["sequence"]
            key = [record[name] for name in ("rank", "name", "iteration", "microbatch", "phase", "occurrence")]
            assert tuple(key) not in keys
            keys.add(tuple(key))


def test_another_bucket_layout_is_another_order_of_communication(folder: Path, data: Path) -> None:
    dp3 = (*RECORD, "parallel.overlap_grad_reduce=true", "parallel.use_distributed_optimizer=false")
    small = ("train.global_batch_size=3", "train.train_iters=1", "replay.level=light")
    for name, size in (("large buckets", 100_000), ("small buckets", 20_000)):
        assert runs.train(folder / name, data, 3, *dp3, *small, f"parallel.ddp_bucket_size={size}") == 0
    first, second = Capsule.of(folder / "large buckets"), Capsule.of(folder / "small buckets")
    found = first_divergence(first, second)
    assert found is not None and found.key.phase is Phase.GRADIENT and found.step == 1
    judged = cause(first, second, found)
    assert judged.kind == "communication order"
    assert {"config.parallel.ddp_bucket_size", "buckets"} <= {fact.key for fact in judged.evidence}


def test_a_resumed_run_goes_on_recording_the_same(plain: Path, folder: Path, data: Path) -> None:
    resumed = folder / "resumed"
    assert runs.train(resumed, data, 4, *RECORD, *DP4, "train.exit_interval=2") == 75
    assert runs.train(resumed, data, 4, *RECORD, *DP4) == 0
    frames = [(one.step, one.flags) for one in Capsule.of(resumed).frames(3)]
    assert frames == [(0, Flag.START), (1, Flag(0)), (2, Flag(0)), (2, Flag.START), (3, Flag(0))]
    assert first_divergence(Capsule.of(plain), Capsule.of(resumed)) is None
    assert batches.kept_steps(resumed / "replay", 1) == [2, 3]
    assert Capsule.of(resumed).manifest(3)["step"] == 2 and Capsule.of(resumed).manifest(2, rank=3)["step"] == 0


RUN_FACTS = ("code.sources_sha256", "code.commit", "config.model.num_layers", "surroundings.versions.torch",
    "surroundings.versions.megatron-core", "surroundings.python", "surroundings.cpu", "data.tokenizer_hash",
    "data.sources.corpus.digest", "cursor.seq_length", "world_size", "layout.dp", "groups.tp", "groups.dp", "groups.pp",
    "schedule.layers", "schedule.micro_batches", "schedule.virtual_pipeline")  # fmt: skip
RANK_FACTS = ("host", "device", "cores", "libraries.cpu_capability", "libraries.build", "threads.intra_op",
    "threads.inter_op", "switches.deterministic_algorithms", "environment.OMP_NUM_THREADS", "buckets")  # fmt: skip


def test_the_manifests_hold_what_decides_the_numbers(plain: Path) -> None:
    capsule = Capsule.of(plain)
    run, ranks = capsule.manifest(1), [capsule.manifest(1, rank) for rank in range(4)]
    for manifest, facts in ((run, RUN_FACTS), *((own, RANK_FACTS) for own in ranks)):
        for name in facts:
            value: Any = manifest
            for part in name.split("."):
                value = value[part]
            assert value not in (None, "", []), name
    assert run["groups"]["dp"] == [[0, 1, 2, 3]] and run["schedule"]["micro_batches"] == 2
    assert (plain / "replay" / "tokenizer" / "tokenizer.model").is_file()


def test_kept_batches_are_what_was_read(plain: Path) -> None:
    from megatron_slm.replay.fingerprint import digests

    kept = batches.read(plain / "replay", 2, STEPS).micro_batches
    records, names = frame(plain, 2, STEPS).records, Capsule.of(plain).names(2)
    noted = {
        (int(one["micro_batch"]), names[one["name"]].split()[0]): one["lanes"].tolist()
        for one in records
        if one["phase"] == Phase.BATCH
    }
    for number, batch in enumerate(kept):
        for name, tensor in batch.items():
            assert digests([tensor])[0].tolist() == noted[number, name]


CHANGES = {
    "learning rate": ("optimizer.lr=4e-4", Phase.PARAMETER, "configuration"),
    "order of samples": ("data.data_seed=5", Phase.BATCH, "configuration"),
    "seed": ("train.seed=5", Phase.RNG, "random numbers"),
}


def test_changes_of_the_configuration_are_named(folder: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_rank = (*RECORD, "train.train_iters=2", "replay.level=op", "replay.op_steps=2")
    assert runs.train(folder / "alone", data, 1, *one_rank) == 0
    records = frame(folder / "alone", 0, 2).records
    operations = [record for record in records if record["phase"] == Phase.OPERATION]
    names = {Capsule.of(folder / "alone").names(0)[one["name"]].split("[")[0] for one in operations}
    assert "aten.mm.default" in names and len(operations) > 200
    for name, (change, phase, kind) in CHANGES.items():
        assert runs.train(folder / name, data, 1, *one_rank, change) == 0
        first, second = Capsule.of(folder / "alone"), Capsule.of(folder / name)
        found = first_divergence(first, second)
        assert found is not None and found.key.phase is phase, name
        judged = cause(first, second, found)
        assert judged.kind == kind and change.split("=")[0] in {fact.key[7:] for fact in judged.evidence}
    assert cli.main(["replay", "diff", str(folder / "alone"), str(folder / "learning rate")]) == 1
    assert "the learning rates were 0.0003 and 0.0004" in capsys.readouterr().out
    assert cli.main(["replay", "show", str(folder / "alone"), "--step", "2"]) == 0
    assert "parameter" in capsys.readouterr().out
    assert cli.main(["replay", "show", str(folder / "alone")]) == 0
    assert "op, 1 ranks" in capsys.readouterr().out


def test_a_roll_back_and_a_stop_leave_whole_streams(folder: Path, data: Path) -> None:
    options = ("replay.level=light", "train.train_iters=5", "train.eval_iters=0", "checkpoint.save_interval=2")
    back = folder / "back"
    assert runs.train(back, data, 2, *options, "train.non_finite_policy=rollback", plant=spoil_step_4) == 0
    for rank in range(2):
        frames = [(one.step, one.flags) for one in Capsule.of(back).frames(rank)]
        steps = [(step, Flag(0)) for step in range(1, 6)]
        assert frames == [(0, Flag.START), *steps[:2], (2, Flag.START), *steps[2:]]
    with pytest.raises(RankFailure, match="step 4"):
        runs.train(folder / "stopped", data, 2, *options, plant=spoil_step_4)
    last = list(Capsule.of(folder / "stopped").frames(1))[-1]
    assert (last.step, last.flags) == (4, Flag.UNFINISHED)
    assert set(last.records["phase"].tolist()) == {Phase.BATCH, Phase.RNG, Phase.LOSS, Phase.LOCAL_GRADIENT}


def test_other_layouts_are_refused(plain: Path, folder: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.train(folder / "one", data, 1, *RECORD, "train.train_iters=1") == 0
    assert cli.main(["replay", "diff", str(plain), str(folder / "one")]) == 2
    assert "one to one" in capsys.readouterr().err
    assert cli.main(["replay", "diff", str(plain), str(folder)]) == 2
    assert "--record" in capsys.readouterr().err
    assert stream.ranks_in(plain / "replay") == [0, 1, 2, 3]
