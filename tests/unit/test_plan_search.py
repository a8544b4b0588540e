"""The search: complete, true to the rules, and near what people chose by hand; what the command prints and writes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from megatron_slm import cli
from megatron_slm.config.load import load, value_of
from megatron_slm.config.rules import violations
from megatron_slm.errors import ConfigError
from megatron_slm.memory.capacity import GIB
from megatron_slm.parallel.layout import Layout
from megatron_slm.plan.cluster import CLUSTERS
from megatron_slm.plan.memory_estimate import ERROR, MemoryRange, allocated_bytes, estimate
from megatron_slm.plan.predict import Question, predict
from megatron_slm.plan.rates import PUBLISHED
from megatron_slm.plan.search import Found, Space, layouts, search

GPT = [
    "model.num_layers=96", "model.hidden_size=12288", "model.num_attention_heads=96", "model.vocab_size=51200",
    "model.seq_length=2048", "model.swiglu=false", "model.normalization=LayerNorm", "model.add_bias_linear=true",
    "model.position_embedding_type=learned_absolute", "model.untie_embeddings_and_output_weights=false",
]  # fmt: skip


def question_of(cluster: str, gpus: int, *tokens: str) -> Question:
    config = load(None, ["precision.bf16=true", *tokens]).config
    place = CLUSTERS[cluster].of_gpus(gpus)
    return Question(config, place, PUBLISHED[place.architecture])


def found_of(question: Question, *, only: Mapping[str, Any] = MappingProxyType({}), **options: Any) -> Found:
    """A search of the whole space, or with some axes held to ``only`` these values."""
    space = Space.of(question.config, question.cluster.gpus, question.cluster.gpus_per_node)
    return search(question, dataclasses.replace(space, **only), estimate, **options)


def degrees(found: Found, count: int) -> list[tuple[int, int]]:
    """(tp, pp) of the fastest layouts."""
    parallel = [candidate.config.parallel for candidate in found.fitting[:count]]
    return [(one.tensor_model_parallel_size, one.pipeline_model_parallel_size) for one in parallel]


@pytest.mark.parametrize(
    ("cluster", "gpus", "tokens", "chosen"),
    [
        ("h100-80gb", 16384, ["preset=llama3-405b", "train.global_batch_size=2048"], (8, 16)),
        ("a100-80gb", 64, [*GPT, "train.global_batch_size=64"], (8, 8)),
        ("h100-80gb", 256, ["preset=llama3-70b", "train.global_batch_size=512"], (4, 4)),
    ],
    ids=["Llama 3 405B (arXiv 2407.21783)", "GPT-3 175B (arXiv 2205.05198)", "Llama 3 70B (dgxc-benchmarking)"],
)
def test_what_was_chosen_by_hand_is_among_the_five_fastest(
    cluster: str, gpus: int, tokens: list[str], chosen: tuple[int, int]
) -> None:
    # Without sequence parallelism no layout is among the fastest; leaving them out halves the test's time.
    found = found_of(question_of(cluster, gpus, *tokens), only={"sequence_parallel": (True,)}, top=5)
    assert chosen in degrees(found, 5)
    assert found.considered >= 1000
    assert found.considered == found.fits + found.too_large + sum(found.refused.values())


@pytest.mark.parametrize("preset", ["smollm2-1.7b", "mixtral-8x7b"])
def test_every_layout_that_is_returned_keeps_every_rule(preset: str) -> None:
    question = question_of("b200", 16, f"preset={preset}", "train.global_batch_size=16", "model.seq_length=2048")
    found = found_of(question, only={"micro_batch": (1, 2), "vpp": (1, 2), "cp": (1, 2)}, top=40)
    assert found.fits > 10
    for candidate in found.fitting:
        assert violations(candidate.config, 16) == []
        assert candidate.memory.high <= question.cluster.memory_bytes


def test_the_fastest_are_truly_the_fastest() -> None:
    """Against every layout predicted in full, without bounds."""
    question = question_of("h100-80gb", 16, "preset=llama3-8b", "train.global_batch_size=32")
    found = found_of(question, top=10)
    space = Space.of(question.config, 16, 8)
    capacity, every = question.cluster.memory_bytes, []
    for config in layouts(question.config, space, 16):
        if not violations(config, 16) and estimate(config).verdict(capacity) == "fits":
            every.append(predict(dataclasses.replace(question, config=config)).step_seconds)
    fastest = [candidate.prediction.step_seconds for candidate in found.fitting]
    assert fastest == pytest.approx(sorted(every)[: len(fastest)])
    assert found.fits == len(every) > 10


def test_no_combination_comes_twice() -> None:
    question = question_of("h100-80gb", 64, "preset=mixtral-8x7b", "train.global_batch_size=64")
    every = list(layouts(question.config, Space.of(question.config, 64, 8), 64))
    assert len(set(every)) == len(every)


def test_near_misses_are_faster_and_too_large() -> None:
    question = question_of("h100-80gb", 64, "preset=llama3-70b", "train.global_batch_size=64")
    only = {"vpp": (1, 5), "sequence_parallel": (True,)}
    found = found_of(question, only=only)
    best = found.fitting[0].prediction.step_seconds
    assert found.near_misses, "the fastest layout of a large model is not one that fits by luck"
    for candidate in found.near_misses:
        assert candidate.prediction.step_seconds < best
        assert candidate.memory.high > question.cluster.memory_bytes
    tight = found_of(question, only=only, allow_tight=True)
    assert tight.fits > found.fits
    assert tight.fitting[0].prediction.step_seconds <= best


def test_memory_is_asked_of_the_function_that_is_handed_in() -> None:
    question = question_of("h100-80gb", 8, "preset=llama3-8b", "train.global_batch_size=8")
    space = Space.of(question.config, 8, 8)
    endless = MemoryRange(math.inf, math.inf, math.inf)
    nothing = search(question, space, lambda config: endless)
    assert nothing.fitting == []
    assert [one.memory for one in nothing.near_misses] == [endless], (
        "the one that needs the least is named all the same"
    )
    assert nothing.too_large == nothing.considered - sum(nothing.refused.values())


def test_a_batch_that_nothing_divides_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"divides train\.global_batch_size 7 into whole micro-batches"):
        found_of(question_of("h100-80gb", 16384, "preset=smollm2-135m", "train.global_batch_size=7"))


@pytest.mark.parametrize(
    ("tokens", "measured_mib"),
    [
        (["preset=llama3-70b", "model.num_layers=12", "parallel.tensor_model_parallel_size=8"], 28965),
        (["preset=llama3-70b", "model.num_layers=12", "parallel.tensor_model_parallel_size=2"], 62136),
        (["preset=llama3-70b", "model.num_layers=12", "parallel.pipeline_model_parallel_size=2"], 68149),
        (["preset=llama3-405b", "model.num_layers=4", "parallel.tensor_model_parallel_size=8"], 39500),
        (["preset=llama3-405b", "model.num_layers=4", "parallel.tensor_model_parallel_size=2"], 83550),
        (["preset=llama3-405b", "model.num_layers=4", "parallel.pipeline_model_parallel_size=2"], 89173),
    ],
)
def test_the_estimate_is_near_measured_ranks(tokens: list[str], measured_mib: int) -> None:
    """Peaks on 8 B200 (MooreThreads/SimuMax v1.2: S 4096, bf16, 4 micro-batches), within the estimate's own error."""
    tp = next((part.split("=")[1] for part in tokens if "tensor" in part), "1")
    batch = 8 // int(tp) * 4 // (2 if "pipeline" in tokens[-1] else 1)
    counted = [f"parallel.account_for_{part}_in_pipeline_split=false" for part in ("embedding", "loss")]
    given = [*tokens, *counted, f"parallel.sequence_parallel={str(tp != '1').lower()}"]
    given += [
        "model.seq_length=4096",
        "precision.bf16=true",
        "parallel.world_size=8",
        f"train.global_batch_size={batch}",
    ]
    config = load(None, [*given, *(["model.num_query_groups=16"] if "405" in tokens[0] else [])]).config
    peak = max(allocated_bytes(config, Layout.from_config(config.parallel, 8))) / 2**20
    assert peak == pytest.approx(measured_mib, rel=ERROR)


def run(capsys: pytest.CaptureFixture[str], *tokens: str) -> tuple[int, str, str]:
    code = cli.main(["plan", *tokens])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


BASIC = ("--model", "llama3-8b", "--cluster", "h100", "--gpus", "16", "--global-batch-size", "32")


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *BASIC, "--json", "--top", "3", "--price", "2")
    record = json.loads(out)
    assert code == 0
    assert len(record["layouts"]) == 3
    first = record["layouts"][0]
    tokens = 32 * 8192
    assert first["tokens_per_second_per_gpu"] == pytest.approx(tokens / first["step_seconds"] / 16)
    hours = 1e9 / (first["tokens_per_second_per_gpu"] * 16) * 16 / 3600
    assert first["cost_per_billion_tokens"] == pytest.approx(2 * hours)
    assert 0 < first["mfu"] < 1
    sent = first["sent_bytes_per_rank"]
    assert sum(entry["inside_node"] for entry in sent["by_axis"]) == pytest.approx(sent["inside_node"], abs=10)
    assert all(rate["from"] for rate in record["rates"].values()), "every constant says where it comes from"
    assert all("needs" in miss["why_not"] for miss in record["near_misses"])


def test_what_the_command_line_names_is_held(capsys: pytest.CaptureFixture[str]) -> None:
    held = ("parallel.tensor_model_parallel_size=2", "train.micro_batch_size=1")
    code, out, _ = run(capsys, *BASIC, *held, "--json", "--top", "50")
    record = json.loads(out)
    assert code == 0 and record["layouts"]
    for one in record["layouts"]:
        layout = one["layout"]
        assert (layout["parallel.tensor_model_parallel_size"], layout["train.micro_batch_size"]) == (2, 1)
    assert "parallel.tensor_model_parallel_size = 2 is held, as given." in record["notes"]


def test_where_nothing_fits_the_smallest_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--model", "llama3-8b", "--cluster", "h100", "--gpus", "1", "--global-batch-size", "8")
    assert code == 1
    assert "nothing fits" in out and "recompute=full" in out and "of 79.1" in out


def test_the_winner_is_written_as_a_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "winner.yaml"
    code, out, _ = run(capsys, *BASIC, "--output", str(file), "--json", "--top", "1")
    assert code == 0
    resolved = load(file)
    for key, value in json.loads(out)["layouts"][0]["layout"].items():
        own = value_of(resolved.config, key)
        assert (list(own) if isinstance(own, tuple) else own) == value
    assert resolved.config.precision.bf16
    assert cli.main(["check", str(file), "--skip-files"]) == 0


def test_a_model_of_one_s_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text("model:\n  num_layers: 8\n  hidden_size: 1024\n  vocab_size: 32000\n  num_attention_heads: 16\n")
    code, out, err = run(capsys, "--model", str(file), "--cluster", "a100")
    assert code == 0
    assert "8 x a100-80gb" in out
    assert "train.global_batch_size is not given" in err


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--model", "llama3-405b", "--cluster", "h100", "--gpus", "8", "--global-batch-size", "8")
    assert code == 1
    assert "0 fit" in out


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (("--model", "llama9", "--cluster", "h100"), "no such preset and no such file"),
        (("--model", "llama3-8b"), "--cluster is missing"),
        (("--model", "tiny", "--cluster", "h100"), "Add --vocab-size"),
        ((*BASIC, "--top", "0"), "must be at least 1"),
        ((*BASIC, "--price", "nan"), "must be a number above 0"),
        ((*BASIC, "--output", "/nowhere/x.yaml"), "cannot be written"),
        ((*BASIC, "--rates", "/nowhere/x.json"), "cannot be read as JSON"),
        ((*BASIC, "precision.bf16=false"), "rates are known for bf16 alone"),
        ((*BASIC, "model.hiden_size=3"), "hidden_size"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], tokens: tuple[str, ...], message: str) -> None:
    code, _, err = run(capsys, *tokens)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_help_of_both_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    for tokens, example in ((["plan"], "mslm plan --model"), (["plan", "calibrate"], "mslm plan calibrate --ranks")):
        assert cli.main([*tokens, "--help"]) == 0
        assert example in capsys.readouterr().out


def test_a_range_of_memory_is_judged_by_its_ends() -> None:
    found = MemoryRange(70 * GIB, 75 * GIB, 80 * GIB)
    assert [found.verdict(size * GIB) for size in (69, 72, 79, 81)] == ["does not fit", "tight", "tight", "fits"]
