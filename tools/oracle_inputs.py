"""What the oracles of make_oracle_fixtures.py are given, and what is kept of their answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPast

VOCABULARY = 9
TOKENS = [[1, 5, 3, 7, 2, 0], [4, 1, 6, 2, 0, 0], [3, 3, 8, 5, 6, 2], [1, 7, 4, 2, 0, 0]]
LENGTHS = [5, 4, 6, 4]
PROMPTS = [2, 2, 1, 1]
"""Four sequences: tokens, padded with 0; how many are there; how many of those are the prompt."""

Case = dict[str, Any]


def numbers(tensor: Tensor) -> Any:
    """A tensor as nested lists of few digits: 1e-8 of the largest is far below the tests' tolerance."""
    if tensor.dtype in (torch.int64, torch.bool):
        return tensor.tolist()
    if tensor.dim() == 0:
        return float(f"{tensor.item():.9g}")
    return [numbers(part) for part in tensor]


def random(*shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers of three decimals, which JSON keeps exactly."""
    return (torch.randn(*shape, dtype=torch.float64) * scale * 1000).round() / 1000


def case(name: str, oracle: str, config: dict[str, Any], leaf: Tensor, compute: Callable[[Tensor], Tensor]) -> Case:
    """One oracle's loss and gradient with respect to ``leaf``."""
    value = leaf.detach().float().requires_grad_()
    loss = compute(value)
    loss.backward()
    return {"name": name, "oracle": oracle, "config": config, "loss": loss.detach(), "gradient": value.grad}


def sequences() -> Case:
    """What every stage of sequences is given: logits [4, 6, V] of every token's successor among them."""
    return {"tokens": TOKENS, "lengths": LENGTHS, "prompts": PROMPTS, "logits": random(4, 6, VOCABULARY, scale=1.5)}


def completion_mask() -> Tensor:
    """[4, 6]: tokens behind the prompt."""
    places = torch.arange(6)
    return torch.stack([(places >= start) & (places < end) for start, end in zip(PROMPTS, LENGTHS, strict=True)]).long()


def attention_mask() -> Tensor:
    return (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).long()


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w2", bos_token="w1")


def model(classifier: bool = False) -> Any:
    """A Llama whose output matrix is the identity; with ``classifier`` its score is the first hidden number."""
    size = VOCABULARY + 1
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size if classifier else VOCABULARY,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=4,
        pad_token_id=0,
        tie_word_embeddings=False,
        num_labels=1,
    )
    made = (LlamaForSequenceClassification if classifier else LlamaForCausalLM)(config)
    head = made.score if classifier else made.lm_head
    torch.nn.init.eye_(head.weight)
    head.weight.requires_grad_(False)
    return made


def give(made: Any, hidden: Tensor) -> None:
    """Let the backbone answer ``hidden`` [B, S, H], whatever it is asked."""
    made.model.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=hidden)


def settings(directory: Path) -> dict[str, Any]:
    return {
        "output_dir": str(directory / "trainer"),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "gradient_checkpointing": False,
    }


def text_rows(*columns: str) -> Any:
    from datasets import Dataset

    return Dataset.from_list([dict.fromkeys(columns, "w3 w4")] * 4)
