"""``mslm generate``: a run's newest checkpoint, on one rank, continues a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_slm.config.load import load
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.launch.port import reserve_port
from megatron_slm.parallel import device as device_seam
from megatron_slm.parallel.config import ParallelConfig


def generate(
    run: Path, prompt: str, *, max_new_tokens: int, temperature: float, top_k: int, seed: int
) -> Iterator[str]:
    """Pieces of text after ``prompt``. The checkpoint may have been saved under any layout.

    Args:
        run: a run's directory, or one of its checkpoints.

    Raises:
        CheckpointError, DataError: nothing to load, or damaged.
    """
    device = device_seam.choose_device("auto")
    device_seam.preload(device)
    from megatron_slm.model.core_config import transformer_config
    from megatron_slm.model.gpt import build_chunks
    from megatron_slm.parallel.groups import process_groups
    from megatron_slm.parallel.specs import choose_spec
    from megatron_slm.rollout.sample import Sampling, continuation
    from megatron_slm.train import checkpoint, publish
    from megatron_slm.train.random_state import RandomState

    source = checkpoint.find(run)
    publish.verify(source)
    config = load(source / "config.yaml").config
    tokenizer = Tokenizer.open(
        source / "tokenizer" / "tokenizer.model", expected_hash=checkpoint.read_state(source).tokenizer_hash
    )
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    alone = ParallelConfig()
    bound = device_seam.bind(device, 0)
    with reserve_port("127.0.0.1") as reserved:
        address = ("127.0.0.1", reserved.getsockname()[1])
        with process_groups(alone, device=device, rank=0, world_size=1, master=address) as groups:
            RandomState(seed, dp_rank=0, pp_rank=0)
            core = transformer_config(config.model, alone, config.precision, config.train, device=device)
            spec, norm, _ = choose_spec(device, packed_documents=config.data.reset_attention_mask)
            chunks = build_chunks(
                config.model, core, groups, vocab_size=vocab_size, seed=0, spec=(spec, norm), device=bound
            )
            checkpoint.load_weights(source, chunks)
            model = chunks[0].eval()
            ids = continuation(
                model,
                tokenizer.encode(prompt),
                Sampling(max_new_tokens, temperature, top_k, seed),
                vocab_size=vocab_size,
                window=config.model.position_limit,
                eod_id=tokenizer.eod_id,
            )
            said: list[int] = []
            for token in ids:
                before = tokenizer.decode(said)
                said.append(token)
                # Byte-fallback pieces spell a character over several tokens: print only what is complete.
                yield tokenizer.decode(said)[len(before) :]
