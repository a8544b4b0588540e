"""Downscaling: small runs that break no rule, keep options and ratios, hold every axis, and say all they changed."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.cli import main
from megatron_slm.config import downscale_axes, downscale_training
from megatron_slm.config.downscale import Downscaled, downscale, reason
from megatron_slm.config.downscale_axes import Degrees, degrees_of
from megatron_slm.config.keys import all_keys
from megatron_slm.config.load import load, value_of
from megatron_slm.config.presets import PRESETS
from megatron_slm.config.rules import violations
from megatron_slm.config.run_config import RunConfig
from megatron_slm.errors import ConfigError
from megatron_slm.parallel.layout import split_layers
from tests.random_configs import valid_configs

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(ROOT.glob("examples/*/config.yaml"))
LLAMA = (
    "preset=llama3-405b", "parallel.tensor_model_parallel_size=8", "parallel.pipeline_model_parallel_size=16",
    "parallel.context_parallel_size=2", "parallel.sequence_parallel=true",
)  # fmt: skip


def changeable(key: str) -> bool:
    """Whether downscaling may change a key; every other value must be the original's."""
    try:
        return bool(reason(key))
    except KeyError:
        return False


def config(*overrides: str) -> RunConfig:
    return load(None, overrides).config


def moe(**values: Any) -> RunConfig:
    """A mixture of experts in the shape of Mixtral-8x7B."""
    shape = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 14336, "moe_aux_loss_coeff": 0.02}
    known = config("preset=llama3-8b", "model.moe_router_load_balancing_type=aux_loss")
    return dataclasses.replace(known, model=dataclasses.replace(known.model, **{**shape, **values}))


def latent() -> RunConfig:
    """Multi-latent attention, dense layers first, router groups and multi-token prediction, as in DeepSeek-V3."""
    return moe(
        num_layers=62, multi_latent_attention=True, q_lora_rank=1536, num_attention_heads=128, num_query_groups=None,
        num_moe_experts=256, moe_router_topk=8, moe_router_num_groups=8, moe_router_group_topk=4,
        moe_first_dense_layers=3, moe_shared_expert_intermediate_size=2048, moe_ffn_hidden_size=2048, mtp_num_layers=1,
        rope_type="yarn", max_position_embeddings=163840, seq_length=4096, moe_router_score_function="sigmoid",
    )  # fmt: skip


def check(original: RunConfig, small: Downscaled, ranks: int) -> None:
    """What holds for every downscaling."""
    known = {change.key: change for change in small.changes}
    assert not set(small.changes) - {change for change in small.changes if change.reason}
    for index, run in enumerate(small.runs):
        world = run.parallel.world_size
        assert world is not None and 1 <= world <= ranks
        assert violations(run) == []
        for key in all_keys():
            change = known.get(key)
            shown = (
                value_of(original, key) if change is None else change.after[index] if change.by_run else change.after
            )
            assert value_of(run, key) == shown, key
            if not key.startswith("parallel."):
                assert value_of(run, key) == value_of(original, key) or changeable(key)
        assert run.model == small.runs[0].model
        assert run.train.global_batch_size == small.runs[0].train.global_batch_size
        assert run.train.train_iters <= downscale_training.STEPS
    jobs = [degrees_of(run) for run in small.runs]
    axes = set(degrees_of(original).axes)
    assert {axis for job in jobs for axis in job.axes} | {"edp"} == axes | {"edp"} or ranks < 4
    assert small.missed == tuple(downscale_axes.missed_pairs(degrees_of(original), jobs))
    assert len({run.name for run in small.runs}) == len(small.runs)


def random_layout(preset: str, draw: random.Random) -> RunConfig:
    """A preset under a random layout and random options, valid or not."""
    tp, pp, cp, dp = (draw.choice(sizes) for sizes in ((1, 2, 3, 8), (1, 2, 5, 16), (1, 1, 2), (1, 2, 64)))
    micro, count = draw.choice((1, 2, 4)), draw.choice((1, 2, 8)) * pp
    known = config(f"preset={preset}")
    experts = known.model.num_moe_experts is not None
    ep, etp = (draw.choice((1, 2, 4, 8)), draw.choice((None, 1))) if experts else (1, None)
    steps = draw.choice((3, 100, 500_000))
    granularity = draw.choice((None, "full", "selective"))
    layers = draw.choice((known.model.num_layers, 60, 64))
    return dataclasses.replace(
        known,
        model=dataclasses.replace(known.model, num_layers=layers),
        parallel=dataclasses.replace(
            known.parallel,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=draw.choice((None, 2, 4)) if pp > 1 else None,
            context_parallel_size=cp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp if ep > 1 else None,
            sequence_parallel=tp > 1 and draw.random() < 0.8,
            world_size=tp * pp * cp * dp,
            overlap_param_gather=draw.random() < 0.5,
        ),
        precision=dataclasses.replace(known.precision, bf16=draw.random() < 0.5),
        train=dataclasses.replace(
            known.train,
            micro_batch_size=micro,
            global_batch_size=micro * dp * count,
            train_iters=steps,
            eval_interval=draw.choice((None, 1, steps)),
            recompute_granularity=granularity,
            recompute_method=draw.choice(("uniform", "block")) if granularity == "full" else None,
            recompute_num_layers=draw.choice((1, 2, 4)) if granularity == "full" else None,
            rampup_batch_size=(str(micro * dp * pp), str(micro * dp * pp), "1000") if draw.random() < 0.3 else (),
        ),
        schedule=dataclasses.replace(known.schedule, lr_warmup_iters=draw.choice((0, 1, steps // 2))),
        log=dataclasses.replace(known.log, noise_scale_interval=draw.choice((None, 7))),
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_under_any_layout_becomes_runs_that_break_no_rule(preset: str) -> None:
    draw, tried = random.Random(preset), 0
    for _ in range(400):
        original = random_layout(preset, draw)
        if violations(original):
            continue
        ranks = draw.choice((2, 4, 8))
        check(original, downscale(original, ranks=ranks), ranks)
        tried += 1
        if tried == 25:
            break
    assert tried >= 5, "too few of the random layouts are valid to show anything"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_example_becomes_runs_that_break_no_rule(path: Path, ranks: int) -> None:
    original = load(path).config
    assert violations(original) == []
    check(original, downscale(original, ranks=ranks), ranks)


def test_a_job_of_any_size_is_held_axis_by_axis_and_pair_by_pair() -> None:
    """Whatever the degrees: no axis that was not there, none left out, every pair that fits, no rank too many."""
    powers = (1, 2, 8)
    for tp, pp, cp, dp, ep in itertools.product(powers, powers, powers, powers, powers):
        for vpp, etp in itertools.product((1, 4) if pp > 1 else (1,), (None, 1) if ep > 1 and tp > 1 else (None,)):
            if tp * cp * dp % (ep * (etp or tp)):
                continue  # the experts do not divide over these ranks
            original = Degrees(tp, pp, vpp, cp, dp, ep, etp)
            for ranks in (2, 4, 8):
                jobs = downscale_axes.runs(original, ranks)
                assert all(job.world_size <= ranks and set(job.axes) <= set(original.axes) for job in jobs)
                assert all(job.tp * job.cp * job.dp % (job.ep * (job.etp or job.tp)) == 0 for job in jobs)
                assert all((job.vpp > 1) == (job.pp > 1 and vpp > 1) for job in jobs)
                if ranks >= 4:
                    held = {axis for job in jobs for axis in job.axes}
                    # Twice the same experts take more cp than two where nothing else repeats them.
                    assert held == set(original.axes) or (set(original.axes) - held == {"edp"} and dp == 1)
                    dense = {"tp", "pp", "cp", "dp"}
                    assert not [pair for pair in downscale_axes.missed_pairs(original, jobs) if set(pair) <= dense]


def test_the_fewest_runs_hold_the_axes() -> None:
    llama = Degrees(tp=8, pp=16, cp=2)
    assert list(map(str, downscale_axes.runs(llama, 8))) == ["tp2-pp2-cp2"]
    assert sorted(map(str, downscale_axes.runs(llama, 4))) == ["pp2-cp2", "tp2-cp2", "tp2-pp2"]
    mixtral = Degrees(tp=2, pp=4, dp=8, ep=8)
    assert sorted(map(str, downscale_axes.runs(mixtral, 4))) == ["pp2-dp2-ep2", "tp2-dp2-ep2", "tp2-pp2"]
    # Experts held twice, beside a run whose experts are held once.
    assert Degrees(dp=4, ep=2) in downscale_axes.runs(dataclasses.replace(mixtral, dp=16), 4)
    assert list(map(str, downscale_axes.runs(Degrees(), 4))) == ["one-rank"]


def test_llama_405b_keeps_its_structure() -> None:
    original = config(*LLAMA, "parallel.virtual_pipeline_model_parallel_size=8", "precision.bf16=true",
                      "train.global_batch_size=2048", "parallel.world_size=16384")  # fmt: skip
    small = downscale(original)
    model = small.runs[0].model
    assert model.num_attention_heads // model.query_groups == 128 // 8
    assert model.ffn_size / model.hidden_size == 53248 / 16384
    assert model.position_limit // model.seq_length == 16
    assert (model.use_rope_scaling, model.rope_scaling_factor, model.rotary_base) == (True, 8.0, 500000.0)
    for run in small.runs:
        parallel = run.parallel
        assert run.precision.bf16 and parallel.use_distributed_optimizer
        assert parallel.sequence_parallel == (parallel.tensor_model_parallel_size == 2)
        if parallel.pipeline_model_parallel_size == 1:
            continue
        split = split_layers(model.num_layers, 2, parallel.vpp_size, embedding_counts=True, loss_counts=True)
        # The published layout: one layer a chunk, none beside the embedding and none beside the output layer.
        assert split == [[0, 1], [1, 0]]
    without_vpp = downscale(config(*LLAMA)).runs[0].model
    assert without_vpp.num_layers == 4


def test_a_mixture_of_experts_keeps_its_pattern() -> None:
    small = downscale(moe(num_moe_experts=64, moe_layer_freq=4, num_layers=32)).runs[0].model
    assert {small.is_moe_layer(layer) for layer in range(small.num_layers)} == {True, False}
    assert (small.num_moe_experts, small.moe_router_topk, small.moe_aux_loss_coeff) == (4, 2, 0.02)
    small = downscale(latent()).runs[0].model
    assert [small.is_moe_layer(layer) for layer in range(2)] == [False, True]
    assert (small.moe_router_num_groups, small.moe_router_group_topk, small.moe_router_topk) == (4, 2, 4)
    assert small.num_moe_experts == 16 and small.moe_router_score_function == "sigmoid"
    assert small.multi_latent_attention and small.q_lora_rank == 48 and small.mtp_num_layers == 1
    assert small.moe_shared_expert_intermediate_size == small.moe_ffn_hidden_size
    assert downscale(moe(num_moe_experts=2, moe_router_topk=1)).runs[0].model.num_moe_experts == 2


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"num_attention_heads": 9, "num_query_groups": 3}, (6, 2)),
        ({"num_attention_heads": 14, "num_query_groups": 2}, (14, 2)),
        ({"num_attention_heads": 12, "num_query_groups": None}, (4, 4)),
        ({"num_attention_heads": 16, "num_query_groups": 1}, (16, 1)),
    ],
)
def test_the_ratio_of_heads_to_groups_stays(before: dict[str, Any], after: tuple[int, int]) -> None:
    known = config("preset=llama3-8b")
    small = downscale(dataclasses.replace(known, model=dataclasses.replace(known.model, **before))).runs[0].model
    assert (small.num_attention_heads, small.query_groups) == after
    assert small.hidden_size % small.num_attention_heads == 0 and small.head_dim % 2 == 0


def test_the_vocabulary_is_padded_where_the_original_is_and_holds_the_tokenizer() -> None:
    for preset, padded in (("gpt2", True), ("llama3-8b", False)):
        model = downscale(config(f"preset={preset}")).runs[0].model
        assert model.vocab_size is not None
        assert (model.padded_vocab_size(model.vocab_size) > model.vocab_size) == padded
        model = downscale(config(f"preset={preset}"), tokenizer_size=3000).runs[0].model
        assert model.vocab_size is not None and 3000 <= model.vocab_size < 3200
    assert downscale(config("preset=tiny")).runs[0].model.vocab_size is None


def test_the_schedule_keeps_its_shape() -> None:
    plan = ("train.train_iters=1000", "schedule.lr_warmup_iters=100", "schedule.lr_decay_style=WSD",
            "schedule.lr_wsd_decay_iters=200", "schedule.lr_decay_iters=800", "train.eval_interval=10")  # fmt: skip
    run = downscale(config(*plan, "checkpoint.save_interval=50", "train.spike_policy=rollback")).runs[0]
    assert (run.train.train_iters, run.train.eval_interval, run.checkpoint.save_interval) == (20, 10, 10)
    schedule = run.schedule
    assert (schedule.lr_warmup_iters, schedule.lr_decay_iters, schedule.lr_wsd_decay_iters) == (2, 16, 4)
    assert downscale(config("train.train_iters=3")).runs[0].train.train_iters == 3


def test_the_data_keep_their_plans() -> None:
    plan = ("data.sources=a=x,b=y", "data.weights=a=0.7,b=0.3", "data.phases=1200: a=0.4 b=0.6",
            "data.length_schedule=0: 64,800: 256", "data.reset_attention_mask=true", "train.global_batch_size=16",
            "train.train_iters=120", "train.rampup_batch_size=8,8,320", "train.micro_batch_size=4")  # fmt: skip
    run = downscale(config(*plan, "data.replay_run=runs/x", "data.replay_share=0.1")).runs[0]
    samples = run.train.train_iters * run.train.global_batch_size
    assert run.data.phases == (f"{round(1200 * samples / 1920)}: a=0.4 b=0.6",)
    assert run.data.length_schedule == ("0: 16", f"{round(800 * samples / 1920)}: 64")
    assert run.data.replay_run is None and run.data.weights == ("a=0.7", "b=0.3")
    assert run.train.rampup_batch_size == ("2", "2", str(round(320 * samples / 1920)))
    assert run.train.global_batch_size == 6


def test_accumulation_stays() -> None:
    for dp, batch, microbatches in ((4, 64, 3), (4, 16, 2), (4, 8, 1)):
        original = config("train.micro_batch_size=2", f"parallel.world_size={dp}", f"train.global_batch_size={batch}")
        run = downscale(original).runs[0]
        assert run.train.global_batch_size == run.train.micro_batch_size * 2 * microbatches


def test_a_pipeline_is_filled_twice_where_the_original_fills_it() -> None:
    for batch, microbatches in ((64, 4), (4, 4), (3, 2), (1, 2)):
        original = config("parallel.pipeline_model_parallel_size=2", f"train.global_batch_size={batch}")
        assert downscale(original).runs[0].train.global_batch_size == microbatches


@pytest.mark.parametrize("ranks", [0, 1, 9])
def test_a_number_of_ranks_out_of_range_is_refused(ranks: int) -> None:
    with pytest.raises(ConfigError, match=f"--ranks {ranks}: a downscaled run has 2 to 8"):
        downscale(config(), ranks=ranks)


def test_check_shows_every_change_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["check", "--downscale", *LLAMA, f"log.runs_dir={tmp_path}"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for change in downscale(config(*LLAMA)).changes:
        assert change.key in printed or change.key in ("name", "log.runs_dir"), change.key
    assert "run tp2-pp2: 4 rank(s), holds tp, pp" in printed and "made-up tokens" in printed
    assert list(tmp_path.iterdir()) == []
    assert main([*command, "--ranks", "8"]) == 0
    assert "run tp2-pp2-cp2: 8 rank(s)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["--downscale", "--ranks", "9"], "2 to 8"),
        (["--ranks", "4"], "belongs to --downscale"),
        (["--downscale", "--tensor-model-parallel-size=3"], "num_attention_heads = 8"),
        (["--downscale", "--skip-files"], "not allowed with"),
    ],
)
def test_refusals(tokens: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--preset", "tiny", *tokens]) == 2
    assert said in capsys.readouterr().err


def test_experts_cut_otherwise_than_the_rest_stay_so_without_expert_parallelism() -> None:
    original = moe()
    parallel = dataclasses.replace(
        original.parallel, tensor_model_parallel_size=8, expert_tensor_parallel_size=1, sequence_parallel=True
    )
    runs = downscale(dataclasses.replace(original, parallel=parallel)).runs
    assert {(run.parallel.tensor_model_parallel_size, run.parallel.expert_tensor_parallel_size) for run in runs} == {
        (2, 1)
    }
    assert not any(violations(run, run.parallel.world_size) for run in runs)


def test_odd_shapes_under_odd_layouts_become_runs_that_break_no_rule() -> None:
    draw = random.Random(0)
    for original in valid_configs(seed=0, count=300):
        ranks = draw.choice((2, 4, 4, 8))
        check(original, downscale(original, ranks=ranks), ranks)
