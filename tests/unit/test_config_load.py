"""Files, presets and overrides -> one configuration with the source of every value."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_slm.config.keys import all_keys
from megatron_slm.config.load import examine, load
from megatron_slm.config.presets import PRESETS
from megatron_slm.config.run_config import RunConfig
from megatron_slm.errors import ConfigError


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write_file


def refusal(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load(path, overrides)
    return str(refused.value)


def test_precedence_and_provenance(write) -> None:
    path = write("preset: tiny\n\nmodel:\n  hidden_size: 512\n  num_layers: 8\ntrain:\n  seed: 5\n")
    resolved = load(path, ["--num-layers", "12"])
    expected = {
        "train.micro_batch_size": (1, "default"),
        "model.num_query_groups": (4, "preset tiny"),
        "model.hidden_size": (512, f"file {path}:4"),
        "model.num_layers": (12, "command line"),
        "train.seed": (5, f"file {path}:7"),
        "preset": ("tiny", f"file {path}:1"),
    }
    assert {key: (resolved.value(key), resolved.provenance[key]) for key in expected} == expected
    assert set(resolved.provenance) == set(all_keys())


def test_the_command_line_chooses_another_preset_than_the_file(write) -> None:
    resolved = load(write("preset: tiny\n"), ["preset=gpt2"])
    assert resolved.config.model.hidden_size == 768
    assert resolved.provenance["model.hidden_size"] == "preset gpt2"


def test_default_name(write) -> None:
    assert load(write("preset: tiny\n")).config.name == "run"
    assert load(None, ["--preset", "tiny"]).config.name == "tiny"
    assert load(None).config.name == "pretrain"
    assert load(None, ["--preset", "tiny", "name=first"]).config.name == "first"


def test_nothing_given_is_the_default() -> None:
    assert load(None, ["name=x"]).config == RunConfig(name="x")


@pytest.mark.parametrize("preset", PRESETS)
def test_resolved_yaml_reloads_to_an_equal_configuration(preset: str, tmp_path: Path) -> None:
    overrides = ["--lr", "1e-5", "data.data_path=no", "--tokenizer-model", "a b: #c", "train.recompute_modules=mlp"]
    resolved = load(None, ["--preset", preset, "checkpoint.pretrained_checkpoint=~/ü/none", *overrides])
    saved = tmp_path / "config.yaml"
    saved.write_text(resolved.to_yaml())
    again = load(saved)
    assert again.config == resolved.config
    assert again.to_yaml() == resolved.to_yaml()
    assert set(again.provenance.values()) == {f"file {saved}:{line + 1}" for line in _lines_with_a_value(saved)}


def _lines_with_a_value(path: Path) -> list[int]:
    lines = path.read_text().splitlines()
    return [number for number, line in enumerate(lines) if line and not re.fullmatch("[a-z]+:", line)]


def test_provenance_record_holds_every_key() -> None:
    record = load(None, ["--seed", "7"]).provenance_record()
    assert list(record) == list(all_keys())
    assert record["train.seed"] == {"value": 7, "source": "command line"}
    assert record["optimizer.lr"] == {"value": 3e-4, "source": "default"}


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optimizer: {lr: 1e-4}", "optimizer.lr", 1e-4),
        ("optimizer: {lr: 1}", "optimizer.lr", 1.0),
        ("model: {num_query_groups: null}", "model.num_query_groups", None),
        ("model: {num_query_groups: none}", "model.num_query_groups", None),
        ("model:\n  num_query_groups:\n", "model.num_query_groups", None),
        ("model: {position_embedding_type: none}", "model.position_embedding_type", "none"),
        ("precision: {bf16: yes}", "precision.bf16", True),
        ("train: {seed: 010}", "train.seed", 10),
        ("train: {recompute_modules: [core_attn, mlp]}", "train.recompute_modules", ("core_attn", "mlp")),
        ("train: {recompute_modules: 'core_attn,mlp'}", "train.recompute_modules", ("core_attn", "mlp")),
        ("name: 2024", "name", "2024"),
        ("data: {data_path: 'none'}", "data.data_path", "none"),
        ("model:\n", "model.num_layers", 2),
        ("model.num_layers: 3", "model.num_layers", 3),
        ("", "model.num_layers", 2),
    ],
)
def test_accepted_spellings(write, text: str, key: str, value: object) -> None:
    found = load(write(text)).value(key)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {num_layers: two}", ("model.num_layers = two", "run.yaml:1", "a whole number")),
        ("\nmodel:\n  num_layers: 1.5", ("model.num_layers = 1.5", "run.yaml:3", "a whole number")),
        ("model: {num_layers: true}", ("model.num_layers = true", "a whole number")),
        ("model: {num_layers: '4'}", ('model.num_layers = "4"', "a whole number")),
        ("model: {num_layers: null}", ("model.num_layers = null", "a whole number")),
        ("model: {num_layers: [4]}", ("model.num_layers = [", "a whole number")),
        ("model: {num_layers: 0}", ("model.num_layers = 0", "at least 1")),
        ("optimizer: {lr: .nan}", ("optimizer.lr = .nan", "a number")),
        ("optimizer: {adam_beta1: 1.5}", ("optimizer.adam_beta1 = 1.5", "from 0 to 1")),
        ("precision: {bf16: 1}", ("precision.bf16 = 1", "true or false")),
        ("model: {normalization: rmsnorm}", ('"rmsnorm"', "one of RMSNorm, LayerNorm")),
        ("preset: llama4", ("preset = llama4", "run.yaml:1", "llama3-8b", "tiny")),
        ("stage: sftt", ('stage = "sftt"', "one of pretrain")),
        ("model: {num_layer: 2}", ("model.num_layer (file", "did you mean model.num_layers?")),
        ("train: {num_layers: 2}", ("train.num_layers", "did you mean model.num_layers?")),
        ("modle: {num_layers: 2}", ("modle (file",)),
        ("model: 3", ("model (file", "section")),
        ("model: {num_layers: {a: 1}}", ("model.num_layers (file", "single value")),
        ("train: {seed: 1}\nmodel: {num_layers: 2, num_layers: 3}", ("model.num_layers is given twice",)),
        ("train:\n  seed: 1\ntrain:\n  seed: 1", ("train.seed is given twice", "run.yaml:2", "run.yaml:4")),
        ("train:\n  recompute_modules:\n    - {a: b}", ("train.recompute_modules (", "run.yaml:3", "holds a mapping")),
        ("train: {recompute_modules: [mlp, [a]]}", ("train.recompute_modules (", "holds a list inside its list")),
        ("model: {num_layers: [[4]]}", ("model.num_layers (", "every item is a single value")),
        ("model:\n  ? [a, b]\n  : 1", ("A key in model (", "run.yaml:2", "is a list; a key is a name")),
        ("? {a: b}\n: 1", ("A key (", "run.yaml:1", "is a mapping; a key is a name")),
        ("- a", ("mapping of sections",)),
        ("model: {num_layers: 2", ("run.yaml:1", "no valid YAML")),
        ("a: 1\n---\nb: 2", ("no valid YAML",)),
    ],
)
def test_refused_files_name_key_value_type_and_line(write, text: str, words: tuple[str, ...]) -> None:
    message = refusal(write(text))
    assert all(word in message for word in words), message
    assert "Node(" not in message


def test_missing_file_is_refused_with_a_remedy(tmp_path: Path) -> None:
    assert "--preset tiny" in refusal(tmp_path / "absent.yaml")
    assert "cannot be read" in refusal(tmp_path)


def test_every_problem_is_listed_at_once(write) -> None:
    path = write("model: {num_layers: two, widht: 3}\ntrain: {seed: -1}")
    message = refusal(path, "--lr", "fast", "--lrr", "1", "stray")
    for problem in ("num_layers = two", "model.widht", "train.seed = -1", "optimizer.lr = fast", "--lrr", "stray"):
        assert problem in message
    assert len(message.splitlines()) == 6


def test_what_can_be_read_is_resolved_beside_the_problems(write) -> None:
    path = write("preset: tiny\nmodel: {num_layers: 6, widht: 3}\ntrain: {seed: 5}\n")
    resolved, problems = examine(path, ["preset=llama4", "--num-layers", "two", "--seed", "7", "--lr", "fast"])
    assert len(problems) == 4
    expected = {
        "preset": ("tiny", f"file {path}:1"),
        "model.num_layers": (6, f"file {path}:2"),
        "model.hidden_size": (load(None, ["preset=tiny"]).config.model.hidden_size, "preset tiny"),
        "train.seed": (7, "command line"),
        "optimizer.lr": (
            load(None, ["preset=tiny"]).config.optimizer.lr,
            load(None, ["preset=tiny"]).provenance["optimizer.lr"],
        ),
    }
    assert {key: (resolved.value(key), resolved.provenance[key]) for key in expected} == expected
    assert refusal(path, "preset=llama4", "--num-layers", "two", "--seed", "7", "--lr", "fast").splitlines() == problems
    assert examine(write("train: {seed: 5}")) == (load(path), [])


def test_a_mapping_may_stand_for_a_list_of_assignments(tmp_path: Path) -> None:
    file = tmp_path / "mixture.yaml"
    file.write_text("data:\n  sources: {kjv: data/kjv, code: data/code}\n  weights:\n    kjv: 0.7\n    code: 0.3\n")
    data = load(file).config.data
    assert data.sources == ("kjv=data/kjv", "code=data/code") and data.weights == ("kjv=0.7", "code=0.3")
    file.write_text("data: {sources: {kjv: {path: data/kjv}}}\n")
    with pytest.raises(ConfigError, match="every item is a single value"):
        load(file)


def test_experts_over_tp_are_sequence_parallel_unless_told_otherwise() -> None:
    """Core trains them in no other way; a value that somebody gave is never replaced, but refused by a rule."""
    key, tp2 = "parallel.sequence_parallel", "parallel.tensor_model_parallel_size=2"
    experts = load(None, ["model.num_moe_experts=4", tp2])
    assert experts.config.parallel.sequence_parallel and "experts" in experts.provenance[key]
    for other in (["model.num_moe_experts=4"], [tp2], ["model.num_moe_experts=4", tp2, f"{key}=false"]):
        assert not load(None, other).config.parallel.sequence_parallel
