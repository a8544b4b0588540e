"""Every rule is broken once, alone, and says its keys, values and the way out."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_slm.config.facts import nearest_divisors
from megatron_slm.config.files import missing_inputs
from megatron_slm.config.load import load
from megatron_slm.config.rules import require, violations
from megatron_slm.errors import ConfigError

FULL = ["--recompute-granularity", "full", "--recompute-method"]
SELECTIVE = ["--recompute-granularity", "selective"]
WSD = ["--lr-decay-style", "WSD"]
INTERLEAVED = ["--pipeline-model-parallel-size", "2", "--virtual-pipeline-model-parallel-size", "2"]


def broken(overrides: list[str], world_size: int | None = None) -> list[str]:
    resolved = load(None, overrides)
    return violations(resolved.config, world_size, provenance=resolved.provenance)


ACCEPTED = [
    [],
    ["--preset", "tiny", "--tensor-model-parallel-size", "4", "--sequence-parallel"],
    ["--num-query-groups", "2", "--tensor-model-parallel-size", "4"],
    ["--context-parallel-size", "4", "--cp-comm-type", "all_gather", "--seq-length", "264"],
    ["--context-parallel-size=2", "--tensor-model-parallel-size=4", "--sequence-parallel", "--seq-length=264"],
    ["--hidden-size", "100", "--num-attention-heads", "3", "--kv-channels", "32"],
    [*INTERLEAVED, "--num-layers", "8", "--world-size", "4"],
    [*INTERLEAVED, "--num-layers", "7", "--account-for-loss-in-pipeline-split"],
    ["--overlap-param-gather", "--reduce-scatter-with-fp32-accumulation", "--ddp-bucket-size", "1000"],
    ["--device", "cpu", "--distributed-backend", "gloo", "--fp64"],
    ["--reset-position-ids", "--reset-attention-mask"],
    ["--reset-position-ids", "--position-embedding-type", "learned_absolute"],
    ["--position-embedding-type", "none", "--max-position-embeddings", "8"],
    [*FULL, "uniform", "--recompute-num-layers", "2"],
    [*FULL, "block", "--recompute-num-layers", "1"],
    [*SELECTIVE, "--recompute-modules", "core_attn", "mlp"],
    [*WSD, "--lr-wsd-decay-iters", "90", "--lr-warmup-iters", "10"],
    ["--train-iters", "0"],
    ["--openai-gelu", "--no-swiglu"],
    ["--lr-decay-style", "constant", "--lr-warmup-iters", "10"],
    ["--lr-decay-style", "constant", "--lr", "1e-3", "--min-lr", "1e-3"],
    ["--lr-decay-style", "constant", "--min-lr", "0", "--lr-decay-iters", "none"],
    ["--min-lr", "1e-5", "--lr-decay-iters", "50"],
    ["--eval-interval", "10", "--eval-iters", "1"],
    ["--eval-iters", "0"],
    ["--no-accumulate-allreduce-grads-in-fp32", "--bf16"],
    ["--fp64"],
    ["--noise-scale-interval", "10", "--micro-batch-size", "4", "--layer-norms-interval", "5"],
    ["--device", "cuda", "--bf16"],
    ["name=" + "n" * 200],
]


@pytest.mark.parametrize("overrides", ACCEPTED)
def test_accepted(overrides: list[str]) -> None:
    assert broken(overrides) == []


REFUSED = [
    (["name=a/b"], ("name = ", "one directory")),
    (["name=" + "n" * 201], ("name = nnn", "201 bytes", "at most 200", "shorter")),
    (["name=" + "ü" * 101], ("202 bytes", "at most 200")),
    (["--hidden-size", "130"], ("model.hidden_size = 130 (command line)", "128 or 132", "2 or 5", "model.kv_channels")),
    (["--num-query-groups", "3"], ("num_query_groups = 3", "2 or 4")),
    (["--openai-gelu"], ("model.openai_gelu = true (command line)", "model.swiglu = true (default)")),
    (["--position-embedding-type", "none", "--rotary-base", "5e5"], ("model.rotary_base = 500000.0", "rope")),
    (["--position-embedding-type", "learned_absolute", "--use-rope-scaling"], ("model.use_rope_scaling", "rope only")),
    (["--rope-scaling-factor", "4"], ("rope_scaling_factor = 4.0", "use_rope_scaling=true")),
    (["--rotary-percent", "0.1"], ("rotary_percent = 0.1", "3 channels", "even")),
    (["--max-position-embeddings", "128"], ("seq_length = 256", "Largest valid model.seq_length: 128")),
    (["--reset-position-ids"], ("reset_position_ids = true", "data.reset_attention_mask=true")),
    (["--reset-position-ids", "--position-embedding-type", "none"], ("reset_position_ids", "cannot restart")),
    (["--context-parallel-size", "2", "--seq-length", "250"], ("seq_length = 250", "4 equal chunks", "248 or 252")),
    (
        ["--context-parallel-size=2", "--tensor-model-parallel-size=4", "--sequence-parallel", "--seq-length=250"],
        ("context_parallel_size = 2", "over the 4 tp ranks", "248 or 256"),
    ),
    (["--context-parallel-size", "2", "--attention-dropout", "0.1"], ("attention_dropout = 0.1", "no dropout", "=0,")),
    (["--cp-comm-type", "all_gather"], ("cp_comm_type = all_gather", "context_parallel_size = 1", "ignored")),
    (
        ["--tensor-model-parallel-size", "8", "--num-query-groups", "2", "--kv-channels", "32"],
        ("num_attention_heads = 4 (default)", "tensor_model_parallel_size: 4.", "heads: 8."),
    ),
    (
        ["--num-attention-heads", "6", "--num-query-groups", "2", "--tensor-model-parallel-size", "3"]
        + ["--hidden-size", "96", "--ffn-hidden-size", "96", "--make-vocab-size-divisible-by", "96"],
        ("num_query_groups = 2", "multiple or a divisor", "size: 2."),
    ),
    (
        ["--num-attention-heads", "8", "--num-query-groups", "1", "--tensor-model-parallel-size", "8"]
        + ["--kv-channels", "2"],
        ("num_query_groups = 1", "20 rows of the joint"),
    ),
    (["--tensor-model-parallel-size", "4", "--ffn-hidden-size", "322"], ("322 inner channels", "320 or 324")),
    (["--tensor-model-parallel-size=4", "--make-vocab-size-divisible-by=2"], ("a multiple of the former", ": 4.")),
    (
        ["--tensor-model-parallel-size", "4", "--make-vocab-size-divisible-by", "2", "--vocab-size", "1001"],
        ("the 1002 rows",),
    ),
    (["--sequence-parallel"], ("sequence_parallel = true", "tensor_model_parallel_size = 1", "at least 2")),
    (["--sequence-parallel", "--tensor-model-parallel-size", "4", "--seq-length", "250"], ("248 or 252",)),
    (["--pipeline-model-parallel-size", "4"], ("more pipeline stages than layers", "num_layers: 4")),
    ([*INTERLEAVED, "--num-layers", "6"], ("virtual_pipeline_model_parallel_size = 2", "4 or 8")),
    (["--virtual-pipeline-model-parallel-size", "2"], ("at least 2 pipeline stages",)),
    (
        ["--num-layers", "4", "--pipeline-model-parallel-size", "2", "--account-for-loss-in-pipeline-split"],
        ("account_for_loss_in_pipeline_split = true (command line)", "+ 1 for the embedding or loss"),
    ),
    (["--world-size", "3", "--tensor-model-parallel-size", "2"], ("world size 3", "2 or 4")),
    (["--world-size", "3"], ("global_batch_size = 8 (default)", "1 x 3 = 3", "6 or 9")),
    (
        [*INTERLEAVED, "--num-layers", "8", "--global-batch-size", "3"],
        ("multiple of pp micro-batches", "there are 3", "2 or 4"),
    ),
    (
        ["--noise-scale-interval", "10", "--micro-batch-size", "8"],
        ("noise_scale_interval = 10 (command line)", "global_batch_size = 8 (default)", "first 8 samples", ": 16;"),
    ),
    (
        [*INTERLEAVED, "--num-layers", "8", "--global-batch-size", "2", "--noise-scale-interval", "10"],
        ("the first 2 samples", "global_batch_size: 4;"),
    ),
    (["--overlap-param-gather", "--no-use-distributed-optimizer"], ("overlap_param_gather", "distributed optimizer")),
    (["--overlap-param-gather", "--no-overlap-grad-reduce"], ("overlap_param_gather", "overlap_grad_reduce=true")),
    (["--reduce-scatter-with-fp32-accumulation", "--no-use-distributed-optimizer"], ("all-reduced",)),
    (["--reduce-scatter-with-fp32-accumulation", "--fp64"], ("precision.fp64 = true", "round")),
    (["--ddp-bucket-size", "9", "--no-overlap-grad-reduce"], ("ddp_bucket_size = 9", "ignore")),
    (["--device", "cpu", "--distributed-backend", "nccl"], ("device = cpu", "gloo")),
    (["--bf16", "--fp64"], ("precision.bf16 = true (command line) and precision.fp64 = true (command line)",)),
    (["--fp64", "--device", "cuda"], ("fp64 = true (command line)", "device = cuda (command line)", "device=cpu")),
    (
        ["--no-accumulate-allreduce-grads-in-fp32"],
        ("grads_in_fp32 = false (command line)", "precision.bf16 = false (default)", "ignored", "precision.bf16=true"),
    ),
    (
        ["--eval-interval", "5", "--eval-iters", "0"],
        ("train.eval_interval = 5 (command line)", "train.eval_iters = 0", "ignored", "at least 1"),
    ),
    (
        ["--lr-decay-style", "constant", "--min-lr", "1e-5"],
        ("optimizer.min_lr = 1e-05 (command line)", "lr_decay_style = constant", "ignored", "Leave it out"),
    ),
    (
        ["--lr-decay-style", "constant", "--lr-decay-iters", "50"],
        ("schedule.lr_decay_iters = 50 (command line)", "lr_decay_style = constant", "ignored"),
    ),
    ([*FULL, "uniform"], ("recompute_num_layers = null", "needs both")),
    (["--recompute-granularity", "full", "--recompute-num-layers", "1"], ("recompute_method = null", "needs both")),
    ([*FULL, "uniform", "--recompute-num-layers", "3", "--num-layers", "4"], ("4 layers", "1, 2, 4")),
    ([*FULL, "block", "--recompute-num-layers", "3"], ("Largest valid value: 2",)),
    ([*SELECTIVE, "--recompute-method", "block"], ("recompute_method = block", "recompute_granularity=full")),
    (["--recompute-num-layers", "1"], ("recompute_num_layers = 1", "ignored")),
    (["--recompute-modules", "mlp"], ("recompute_modules = [mlp]", "selective")),
    ([*SELECTIVE, "train.recompute_modules="], ("at least one module",)),
    (
        [*SELECTIVE, "train.recompute_modules=mlp", "model.add_bias_linear=true"],
        ("add_bias_linear = true", "without end", "granularity=full"),
    ),
    ([*SELECTIVE, "--recompute-modules", "layernorm"], ("layernorm cannot", "Transformer Engine")),
    ([*SELECTIVE, "--recompute-modules", "moe_act"], ("moe_act cannot", "grouped experts")),
    ([*SELECTIVE, "--recompute-modules", "attention"], ("attention cannot", "core_attn and mlp")),
    (["--min-lr", "1"], ("min_lr = 1.0", "lr = 0.0003", "0.0003")),
    (["--adam-beta2", "1"], ("adam_beta2 = 1.0", "below 1")),
    (["--lr-warmup-iters", "100"], ("train.train_iters = 100 (default)", "lr_warmup_iters: 99")),
    (["--lr-warmup-iters", "50", "--lr-decay-iters", "50"], ("schedule.lr_decay_iters = 50", "49")),
    (WSD, ("lr_wsd_decay_iters = null", "1 to 100")),
    ([*WSD, "--lr-wsd-decay-iters", "95", "--lr-warmup-iters", "10"], ("after warm-up", ": 90")),
    (["--lr-wsd-decay-iters", "5"], ("lr_wsd_decay_iters = 5", "WSD")),
    (["--lr-wsd-decay-style", "linear"], ("lr_wsd_decay_style = linear", "WSD")),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=lambda value: " ".join(value)[:60])
def test_refused_alone_with_keys_values_and_way_out(overrides: list[str], words: tuple[str, ...]) -> None:
    found = broken(overrides)
    assert len(found) == 1, found
    assert all(word in found[0] for word in words), found[0]
    assert "\n" not in found[0]


def test_every_violation_is_listed_at_once() -> None:
    found = broken(["--tensor-model-parallel-size", "3", "--bf16", "--fp64", "--min-lr", "1", *WSD])
    subjects = ("num_attention_heads", "num_query_groups", "make_vocab_size", "precision.bf16", "min_lr", "lr_wsd")
    assert len(found) == len(subjects)
    assert all(subject in sentence for subject, sentence in zip(subjects, found, strict=True))


def test_a_world_other_than_the_configured_one_names_both() -> None:
    found = broken(["--world-size", "4"], world_size=2)
    assert len(found) == 1
    assert "parallel.world_size = 4 (command line)" in found[0] and "started 2 ranks" in found[0]
    assert broken(["--world-size", "4"], world_size=4) == []


def test_without_provenance_the_values_stand_alone() -> None:
    found = violations(load(None, ["--bf16", "--fp64"]).config)
    assert found == ["precision.bf16 = true and precision.fp64 = true exclude each other. Set one of them to false."]


def test_the_source_of_a_value_is_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("preset: tiny\nparallel:\n  tensor_model_parallel_size: 8\n")
    resolved = load(path, ["--num-attention-heads", "4"])
    text = "\n".join(violations(resolved.config, provenance=resolved.provenance))
    assert f"parallel.tensor_model_parallel_size = 8 (file {path}:3)" in text
    assert "model.num_attention_heads = 4 (command line)" in text


def test_require_raises_every_violation() -> None:
    with pytest.raises(ConfigError) as refusal:
        require(load(None, ["--bf16", "--fp64", "--min-lr", "1"]).config)
    assert len(str(refusal.value).splitlines()) == 2
    require(load(None).config)


def test_what_core_refuses_is_refused_here_first() -> None:
    refused = 0
    for heads, groups, tp, pp, vpp in itertools.product((4, 6), (1, 2, 3, 4), (1, 2, 3, 4), (1, 2), (None, 2)):
        for sequence_parallel, loss in itertools.product((False, True), repeat=2):
            keys = {
                "num-attention-heads": heads,
                "num-query-groups": groups,
                "tensor-model-parallel-size": tp,
                "pipeline-model-parallel-size": pp,
                "hidden-size": 48,
                "num-layers": 7,
            }
            flags = [f"--{key}={value}" for key, value in keys.items()]
            flags += [f"--virtual-pipeline-model-parallel-size={vpp}"] * (vpp is not None)
            flags += ["--sequence-parallel"] * sequence_parallel + ["--account-for-loss-in-pipeline-split"] * loss
            try:
                TransformerConfig(
                    num_layers=7,
                    hidden_size=48,
                    num_attention_heads=heads,
                    num_query_groups=groups,
                    tensor_model_parallel_size=tp,
                    pipeline_model_parallel_size=pp,
                    virtual_pipeline_model_parallel_size=vpp,
                    sequence_parallel=sequence_parallel,
                    account_for_loss_in_pipeline_split=loss,
                    pipeline_dtype=torch.float32,
                )
            except ValueError:
                refused += 1
                assert broken(flags), flags
    assert refused > 50


def test_missing_inputs(tmp_path: Path) -> None:
    def missing(*overrides: str) -> list[str]:
        resolved = load(None, overrides)
        return missing_inputs(resolved.config, provenance=resolved.provenance)

    (unset,) = missing()
    assert "data.data_path is not set" in unset and "mslm data prepare" in unset
    (absent,) = missing("--data-path", str(tmp_path / "corpus"))
    assert "no such directory" in absent and f"--output {tmp_path / 'corpus'}" in absent and "(command line)" in absent
    corpus = tmp_path / "corpus"
    (corpus / "train").mkdir(parents=True)
    (unprepared,) = missing("--data-path", str(corpus))
    assert "train/index.json is missing" in unprepared
    (corpus / "train" / "index.json").write_text("{}")
    (damaged,) = missing("--data-path", str(corpus))
    assert "cannot be read (KeyError('vocab_size'))" in damaged
    (corpus / "train" / "index.json").write_text('{"vocab_size": 500}')
    assert missing("--data-path", str(corpus)) == missing("--data-path", str(corpus), "--vocab-size", "500") == []
    (larger,) = missing("--data-path", str(corpus), "--vocab-size", "499")
    assert "model.vocab_size = 499 (command line)" in larger and "500 entries" in larger
    found = missing(
        f"--data-path={corpus}", f"--tokenizer-model={tmp_path / 't'}", f"--pretrained-checkpoint={tmp_path / 'c'}"
    )
    assert ["tokenizer.tokenizer_model" in found[0], "checkpoint.pretrained_checkpoint" in found[1]] == [True, True]


def test_nearest_divisors_are_those_of_the_definition() -> None:
    for number, value in itertools.product(range(1, 61), range(1, 70)):
        divisors = [candidate for candidate in range(1, number + 1) if number % candidate == 0]
        near = [d for d in divisors if d <= value][-1:] + [d for d in divisors if d > value][:1]
        assert nearest_divisors("x", number, value) == f"Nearest valid x: {' or '.join(map(str, near))}."


def test_nearest_divisors_of_a_large_prime_take_no_walk_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[int] = []

    def counted(*bounds: int) -> range:
        walked.append(len(range(*bounds)))
        return range(*bounds)

    monkeypatch.setattr("megatron_slm.config.facts.range", counted, raising=False)
    assert nearest_divisors("x", 100000007, 3) == "Nearest valid x: 1 or 100000007."
    assert walked and sum(walked) <= 10000


def test_the_saved_configuration_of_an_accepted_run_is_accepted(tmp_path: Path) -> None:
    """It names every key, so that no rule may take a default written down for a choice."""
    saved = tmp_path / "config.yaml"
    for overrides in ACCEPTED:
        saved.write_text(load(None, overrides).to_yaml())
        resolved = load(saved)
        assert violations(resolved.config, provenance=resolved.provenance) == [], overrides


def test_the_example_is_accepted() -> None:
    resolved = load(Path(__file__).resolve().parents[2] / "examples" / "kjv" / "config.yaml")
    assert violations(resolved.config, provenance=resolved.provenance) == []
