"""The command line: a.b=c and Megatron's flags."""

from __future__ import annotations

import pytest

from megatron_slm.config.flags import read
from megatron_slm.config.keys import all_keys, flag_table
from megatron_slm.config.load import load
from megatron_slm.errors import ConfigError


def test_field_names_are_unique_across_sections() -> None:
    fields = [key.field for key in all_keys().values()]
    assert len(fields) == len(set(fields))


def test_a_flag_belongs_to_exactly_one_key() -> None:
    every = [flag for key in all_keys().values() for flag in key.flags]
    assert len(every) == len(set(every)) == len(flag_table())


@pytest.mark.parametrize("name", all_keys())
def test_every_key_can_be_given_as_a_flag_and_as_an_assignment(name: str) -> None:
    key = all_keys()[name]
    text = _another_value(name)
    if key.kind is bool:
        flag = next(flag for flag, spelled in key.flags.items() if spelled == text)
        as_flag = load(None, [flag])
    else:
        as_flag = load(None, [key.own_flag, text])
    as_assignment = load(None, [f"{name}={text}"])
    assert as_flag.value(name) == as_assignment.value(name)
    assert as_flag.provenance[name] == as_assignment.provenance[name] == "command line"
    assert as_flag.value(name) != key.default or name == "stage"


def _another_value(name: str) -> str:
    key = all_keys()[name]
    if name == "preset":
        return "gpt2"
    if key.choices:
        return key.choices[-1]
    if key.kind is bool:
        return "false" if key.default else "true"
    return {
        int: str(max(3, int(key.minimum or 0))),
        float: "2.5" if (key.minimum or 0) > 0.5 else "0.25" if key.default == 0.5 or key.below == 0.5 else "0.5",
        str: "other",
        tuple: "mlp",
    }[key.kind]


@pytest.mark.parametrize(
    ("tokens", "key", "value"),
    [
        (["--tensor-model-parallel-size", "2"], "parallel.tensor_model_parallel_size", 2),
        (["--num-layers=4"], "model.num_layers", 4),
        (["--bf16"], "precision.bf16", True),
        (["--bf16=false"], "precision.bf16", False),
        (["--no-swiglu"], "model.swiglu", False),
        (["--disable-bias-linear", "--preset", "gpt2"], "model.add_bias_linear", False),
        (["--add-bias-linear"], "model.add_bias_linear", True),
        (["--norm-epsilon", "1e-6"], "model.layernorm_epsilon", 1e-6),
        (["--layernorm-epsilon", "1e-6"], "model.layernorm_epsilon", 1e-6),
        (["--num-query-groups", "none"], "model.num_query_groups", None),
        (["--recompute-modules", "core_attn", "mlp", "--bf16"], "train.recompute_modules", ("core_attn", "mlp")),
        (["train.recompute_modules=[core_attn,mlp]"], "train.recompute_modules", ("core_attn", "mlp")),
        (["name=a=b"], "name", "a=b"),
        (["--seed", "3", "train.seed=3"], "train.seed", 3),
        (["--lr", "1e-3", "optimizer.lr=0.001"], "optimizer.lr", 1e-3),
    ],
)
def test_accepted_spellings(tokens: list[str], key: str, value: object) -> None:
    assert load(None, tokens).value(key) == value


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["--num-layer", "4"], ("--num-layer (command line)", "did you mean --num-layers?", "Abbreviations")),
        (["--num_layers", "4"], ("did you mean --num-layers?",)),
        (["--tensor-model-parallel", "4"], ("did you mean --tensor-model-parallel-size?",)),
        (["num_layers=4"], ("num_layers (command line) is no key", "did you mean model.num_layers?")),
        (["optimizer.learning_rate_xyz=4"], ("optimizer.learning_rate_xyz",)),
        (["-x"], ("-x (command line) is no flag",)),
        (["--seed", "3", "train.seed=4"], ("train.seed is given twice", "--seed 3", "train.seed=4")),
        (["--bf16", "--no-bf16"], ("precision.bf16 is given twice", "--bf16", "--no-bf16")),
        (["--no-bf16=true"], ("--no-bf16 takes no value", "precision.bf16=true")),
        (
            ["--bf16", "true"],
            ("--bf16 true (command line): --bf16 takes no value", "--no-bf16 or precision.bf16=false"),
        ),
        (["--no-bf16", "False"], ("--no-bf16 False (command line): --no-bf16 takes no value", "precision.bf16=true")),
        (["--disable-bias-linear", "1"], ("--disable-bias-linear takes no value", "model.add_bias_linear=false")),
        (["--hidden-dropout", "1.0"], ("model.hidden_dropout = 1.0", "a number of at least 0 and below 1")),
        (["--attention-dropout", "1"], ("model.attention_dropout = 1", "below 1")),
        (["--adam-eps", "0"], ("optimizer.adam_eps = 0", "a number above 0")),
        (["--init-method-std", "0"], ("model.init_method_std = 0", "above 0")),
        (["--lr"], ("--lr (command line) needs a value", "a number")),
        (["--lr", "--bf16"], ("--lr (command line) needs a value",)),
        (["--lr", "-1"], ("optimizer.lr = -1", "at least 0")),
        (["--seed="], ("train.seed = ", "a whole number")),
        (["--group-query-attention"], ("implied by --num-query-groups",)),
        (["--save", "dir"], ("--name NAME",)),
    ],
)
def test_refused_command_lines(tokens: list[str], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(None, tokens)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_numbers_inside_exclusive_bounds_are_accepted() -> None:
    tokens = [
        "--hidden-dropout",
        "0.999",
        "--attention-dropout",
        "0",
        "--adam-eps",
        "1e-30",
        "--init-method-std",
        "1e-9",
    ]
    assert load(None, tokens).config.model.hidden_dropout == 0.999


def test_a_word_after_a_flag_without_a_value_is_not_taken_for_the_configuration_file() -> None:
    assert read(["run.yaml", "--bf16", "true"]).positionals == ("run.yaml",)
    typed = read(["--bf16", "run.yaml"])
    assert typed.positionals == ("run.yaml",) and not typed.problems


def test_the_configuration_file_is_found_between_flags_in_any_order() -> None:
    tokens = ["--bf16", "--recompute-modules", "mlp", "run.yaml", "train.seed=3", "--lr", "1e-3"]
    typed = read(tokens)
    assert typed.positionals == ("run.yaml",)
    assert typed.overrides == ("--bf16", "--recompute-modules", "mlp", "train.seed=3", "--lr", "1e-3")
    assert not typed.problems
