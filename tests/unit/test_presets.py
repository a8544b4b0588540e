"""Every preset is complete, of the right types, and breaks no rule."""

from __future__ import annotations

import pytest

from megatron_slm.config.keys import all_keys
from megatron_slm.config.load import load
from megatron_slm.config.presets import PRESETS
from megatron_slm.config.rules import violations
from megatron_slm.config.values import Given, parse, show
from megatron_slm.parallel.layout import split_layers

IDS = (
    "llama3-8b llama3-70b llama3-405b qwen2.5-0.5b qwen2.5-7b qwen3-0.6b "
    "smollm2-135m smollm2-360m smollm2-1.7b mixtral-8x7b gpt2 gpt3-175b deepseek-v3 tiny"
)


def test_the_presets_have_the_published_names() -> None:
    assert list(PRESETS) == IDS.split()


@pytest.mark.parametrize("name", PRESETS)
def test_values_are_those_a_file_could_hold(name: str) -> None:
    for key, value in PRESETS[name].values.items():
        read_back = parse(all_keys()[key], Given(key, show(value).strip("[]"), "test"))
        assert (read_back, type(read_back)) == (value, type(value))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_break_no_rule_and_say_nothing_about_ranks(name: str) -> None:
    resolved = load(None, ["--preset", name])
    assert violations(resolved.config, provenance=resolved.provenance) == []
    degrees = [key for key in PRESETS[name].values if key.startswith("parallel.") and key.endswith("_size")]
    assert degrees == []


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fix_the_whole_shape(name: str) -> None:
    shape = {"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "seq_length"}
    shape |= {"max_position_embeddings", "position_embedding_type", "normalization", "layernorm_epsilon", "swiglu"}
    shape |= {"add_bias_linear", "untie_embeddings_and_output_weights"}
    given = {key.removeprefix("model.") for key in PRESETS[name].values}
    assert shape - given == set()
    assert "vocab_size" in given or name == "tiny"


def test_llama_405b_divides_over_sixteen_pipeline_stages() -> None:
    resolved = load(None, ["preset=llama3-405b", "--pipeline-model-parallel-size=16", "--tensor-model-parallel-size=8"])
    assert violations(resolved.config, 128 * 4) == []
    parallel = resolved.config.parallel
    split = split_layers(
        resolved.config.model.num_layers,
        16,
        None,
        embedding_counts=parallel.account_for_embedding_in_pipeline_split,
        loss_counts=parallel.account_for_loss_in_pipeline_split,
    )
    assert [chunks[0] for chunks in split] == [7, *[8] * 14, 7]
