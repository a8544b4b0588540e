"""A checkpoint as a whole model on one rank, and ``mslm generate``, which continues a prompt with it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slm.config.load import load
from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.tokenizer import Tokenizer, find_tokenizer
from megatron_slm.launch.port import reserve_port
from megatron_slm.parallel import device as device_seam
from megatron_slm.parallel.config import ParallelConfig

if TYPE_CHECKING:
    from torch import nn


def generate(
    run: Path, prompt: str, *, max_new_tokens: int, temperature: float, top_k: int, seed: int, ema: bool = False
) -> Iterator[str]:
    """Pieces of text after ``prompt``. The checkpoint may have been saved under any layout.

    Args:
        run: a run's directory, whose newest whole checkpoint is used, or one of its checkpoints.
        ema: use the averages of the weights.

    Raises:
        CheckpointError, DataError: nothing to load, or what is named is damaged, or has no averages, or the weights are
            not finite.
    """
    device = device_seam.choose_device("auto")
    device_seam.preload(device)
    from megatron_slm.rollout.sample import Sampling, continuation
    from megatron_slm.train import recovery

    found = recovery.find(run)
    if found.warning is not None:
        print(f"warning: {found.warning}", file=sys.stderr)
    source = found.path
    config = load(source / "config.yaml").config
    tokenizer = Tokenizer.open(find_tokenizer(source / "tokenizer"), expected_hash=found.state.tokenizer_hash)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    with model_on_one_rank(source, config, vocab_size=vocab_size, device=device, ema=ema) as model:
        prompt_ids = tokenizer.encode(prompt)
        ids = continuation(
            model,
            prompt_ids,
            Sampling(max_new_tokens, temperature, top_k, seed),
            # The model may be wider than the tokenizer, whose ids alone have a text.
            vocab_size=min(vocab_size, tokenizer.vocab_size),
            window=config.model.position_limit,
            eod_id=tokenizer.eod_id,
        )
        yield from text_after(tokenizer, prompt_ids, ids)


@contextmanager
def model_on_one_rank(
    source: Path, config: RunConfig, *, vocab_size: int, device: str, ema: bool = False
) -> Iterator[nn.Module]:
    """The whole model with the weights of checkpoint ``source``, in evaluation mode, as long as this block lasts.

    Args:
        config: its model and precision sections are used; the layout is one rank.
        vocab_size: entries of the vocabulary before padding.
        device: "cuda" or "cpu".
        ema: the averages of the weights.

    Raises:
        CheckpointError: damaged, of another model, or without averages.
    """
    device_seam.preload(device)
    from megatron_slm.model.core_config import transformer_config
    from megatron_slm.model.gpt import build_chunks
    from megatron_slm.parallel.groups import process_groups
    from megatron_slm.parallel.specs import choose_spec
    from megatron_slm.train import checkpoint
    from megatron_slm.train.random_state import RandomState

    alone = ParallelConfig()
    bound = device_seam.bind(device, 0)
    with reserve_port("127.0.0.1") as reserved:
        address = ("127.0.0.1", reserved.getsockname()[1])
        with process_groups(alone, device=device, rank=0, world_size=1, master=address) as groups:
            RandomState(0, dp_rank=0, pp_rank=0)
            core = transformer_config(config.model, alone, config.precision, config.train, device=device)
            spec, norm, _ = choose_spec(device, config.model, packed_documents=config.data.reset_attention_mask)
            chunks = build_chunks(
                config.model, core, groups, vocab_size=vocab_size, seed=0, spec=(spec, norm), device=bound
            )
            checkpoint.load_weights(source, chunks, ema=ema)
            yield chunks[0].eval()


def text_after(tokenizer: Tokenizer, prompt_ids: Sequence[int], ids: Iterable[int]) -> Iterator[str]:
    """The text of ``ids`` after ``prompt_ids``, in pieces as early as they are final; no piece is empty.

    Prompt and continuation are decoded together, because a tokenizer with a dummy prefix drops the first space of what
    it decodes. Byte-fallback pieces spell a character over several tokens, and until the last of them the text ends
    with U+FFFD: such text waits for the next token, or for the end.
    """
    tokens = list(prompt_ids)
    text = tokenizer.decode(tokens)
    shown = len(text)
    for token in ids:
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if len(text) > shown and not text.endswith("\ufffd"):
            yield text[shown:]
            shown = len(text)
    if len(text) > shown:
        yield text[shown:]
