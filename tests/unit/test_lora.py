"""The section ``lora``: its rules, its numbers, and what a merged weight is."""

from __future__ import annotations

import pytest
import torch

from megatron_slm.config.load import load
from megatron_slm.config.rules import violations
from megatron_slm.model.config import LoraConfig, ModelConfig
from megatron_slm.model.counts import adapter_parameters, parameters, parameters_text

START = ("checkpoint.pretrained_checkpoint=runs/base", "stage=sft", "lora.lora_rank=4")
MOE = ("model.num_moe_experts=4",)
MLA = ("model.multi_latent_attention=true", "lora.lora_targets=linear_proj,linear_fc1")
FINE = {
    "all": START,
    "pretraining of a checkpoint": (START[0], START[2]),
    "attention beside experts": (*START, *MOE, "lora.lora_targets=linear_qkv,linear_proj"),
    "beside latents": (*START, *MLA),
    "a flag": (*START[:2], "--lora-rank=8", "--lora-alpha=32", "--lora-rslora"),
}
REFUSED = {
    "no weights": (START[1:], "would be random"),
    "pretraining from nothing": (START[2:], "would be random"),
    "no rank": ((*START[:2], "lora.lora_alpha=32"), "lora.lora_alpha = 32.0 (command line) and lora.lora_rank = 0"),
    "unknown": ((*START, "lora.lora_targets=q_proj"), "name one or more of linear_qkv"),
    "twice": ((*START, "lora.lora_targets=linear_qkv,linear_qkv"), "each once"),
    "experts": ((*START, *MOE), "names linear_fc1, linear_fc2"),
    "latents": ((*START, MLA[0]), "names linear_qkv"),
    "predictions": ((START[0], START[2], "model.mtp_num_layers=1"), "would not be trained"),
}


@pytest.mark.parametrize("case", FINE)
def test_what_has_adapters(case: str) -> None:
    assert not [text for text in violations(load(None, FINE[case]).config) if "lora" in text]


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_none_is_refused(case: str) -> None:
    given, word = REFUSED[case]
    resolved = load(None, given)
    (text,) = [each for each in violations(resolved.config, provenance=resolved.provenance) if "lora" in each]
    assert word in text


def test_the_scale_and_the_count() -> None:
    assert LoraConfig(lora_rank=16, lora_alpha=32.0).scale == 2.0
    assert LoraConfig(lora_rank=16, lora_alpha=32.0, lora_rslora=True).scale == 8.0
    # Llama 2 7B, r 8 on queries, keys, values and output: A and B of 4096 x (4096 + 3 x 4096), and of 4096 x 2 x 4096.
    model = ModelConfig(num_layers=32, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=11008)
    lora = LoraConfig(lora_rank=8, lora_targets=("linear_qkv", "linear_proj"))
    assert adapter_parameters(model, lora) == 32 * 8 * (4096 + 12288 + 4096 + 4096)
    assert adapter_parameters(model, LoraConfig()) == 0
    whole = parameters(model, 32000) + adapter_parameters(model, lora)
    assert parameters_text(model, 32000, lora) == f"{whole:,} (6,291,456 trained, 0.09%)"
    assert parameters_text(model, 32000, LoraConfig()) == parameters_text(model, 32000) == "6,738,415,616"


def test_a_merged_weight_is_rounded_once() -> None:
    from megatron_slm.convert.adapters import merged

    generator = torch.Generator().manual_seed(0)
    weight, first, second = (
        torch.randn(*shape, generator=generator).to(torch.bfloat16) for shape in ((6, 5), (2, 5), (6, 2))
    )
    expected = weight.double() + 0.5 * second.double() @ first.double()
    found = merged(weight, first, second, 0.5)
    assert found.dtype == torch.bfloat16 and found.equal(expected.to(torch.bfloat16))
