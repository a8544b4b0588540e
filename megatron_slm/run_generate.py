"""A checkpoint as a model that speaks, on one rank or divided over several, and what ``mslm generate`` says with it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_slm.config.load import load
from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.tokenizer import Tokenizer, find_tokenizer
from megatron_slm.errors import CheckpointError, LaunchError
from megatron_slm.launch.port import reserve_port
from megatron_slm.parallel import device as device_seam
from megatron_slm.parallel.config import ParallelConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from megatron_slm.launch.environment import RankEnvironment
    from megatron_slm.rollout.generate import Completion
    from megatron_slm.rollout.sampling import Sampling

BATCH_SIZE = 16


@dataclass(frozen=True)
class Manner:
    """How a checkpoint speaks: see ``rollout.sampling.Sampling``. ``ema`` takes the averages of the weights."""

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 1234
    ema: bool = False

    def sampling(self, stop_ids: Sequence[int]) -> Sampling:
        """With the tokens that end what is said.

        Raises:
            ConfigError: a value is out of its range.
        """
        from megatron_slm.rollout.sampling import Sampling

        return Sampling(
            self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.seed, tuple(dict.fromkeys(stop_ids))
        )


class Built(NamedTuple):
    """This rank's chunks of a model, and where they are."""

    chunks: list[nn.Module]
    groups: Any
    device: torch.device


class Answer(NamedTuple):
    """What follows a prompt."""

    prompt: str
    text: str
    completion: Completion


@dataclass(frozen=True)
class Speaker:
    """A checkpoint, loaded. Its methods are collective over the ranks of the model."""

    built: Built
    tokenizer: Tokenizer
    vocab_size: int
    """Real tokens that have a text."""
    position_limit: int

    def prompt_ids(self, prompt: str) -> list[int]:
        """Tokens of a prompt; of an empty one the token that ends a document, after which another begins."""
        return self.tokenizer.encode(prompt) or [self.tokenizer.eod_id]

    def pieces(self, prompt_ids: Sequence[int], manner: Manner, stop_ids: Sequence[int]) -> Iterator[str]:
        """The text that follows, piece by piece as it is drawn, up to one of ``stop_ids``."""
        from megatron_slm.rollout.generate import stream

        chunks, groups, device = self.built
        sampling = manner.sampling(stop_ids)
        drawn = stream(chunks, prompt_ids, sampling, groups=groups, vocab_size=self.vocab_size, device=device)
        ids = (token for token in drawn if token not in sampling.stop_ids)
        # The token that stands for an empty prompt has no text.
        yield from text_after(self.tokenizer, prompt_ids, ids)

    def answers(self, prompts: Sequence[str], manner: Manner, *, batch_size: int = BATCH_SIZE) -> list[Answer]:
        """The texts that follow ``prompts``, up to the end of a document."""
        from megatron_slm.rollout.generate import complete

        chunks, groups, device = self.built
        sampling = manner.sampling([self.tokenizer.eod_id])
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        completions = complete(
            chunks,
            ids,
            sampling,
            step=0,
            samples=range(len(prompts)),
            groups=groups,
            vocab_size=self.vocab_size,
            device=device,
            batch_size=batch_size,
        )
        texts = [
            "".join(
                text_after(self.tokenizer, before, [token for token in one.tokens if token not in sampling.stop_ids])
            )
            for before, one in zip(ids, completions, strict=True)
        ]
        return [Answer(*one) for one in zip(prompts, texts, completions, strict=True)]


def generate(
    run: Path, prompt: str, manner: Manner = Manner(), *, environment: RankEnvironment | None = None
) -> Iterator[str]:
    """Pieces of text after ``prompt``. The checkpoint may have been saved under any layout.

    Args:
        run: a run's directory, whose newest whole checkpoint is used, or one of its checkpoints.
        environment: this rank's, where the model is divided as its configuration says; None is one rank alone.

    Raises:
        CheckpointError, DataError: nothing to load, or what is named is damaged, or has no averages, or the weights are
            not finite.
    """
    with speaker(run, ema=manner.ema, environment=environment) as loaded:
        yield from loaded.pieces(loaded.prompt_ids(prompt), manner, [loaded.tokenizer.eod_id])


def ranks_of(run: Path) -> int:
    """Ranks among which a checkpoint's configuration divides the model (tp x pp).

    Raises:
        CheckpointError: nothing to load.
    """
    from megatron_slm.train import recovery

    return speaking_layout(load(recovery.find(run, hashes=False).path / "config.yaml").config).smallest_world_size


def speaking_layout(config: RunConfig) -> ParallelConfig:
    """The configured tp, pp and vpp. Whole sequences and all experts of a part of the layers are on each rank."""
    return replace(
        config.parallel,
        world_size=None,
        context_parallel_size=1,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=None,
        # One token does not divide over tp; core asks for it with experts all the same.
        sequence_parallel=config.parallel.sequence_parallel and config.model.num_moe_experts is not None,
    )


@contextmanager
def speaker(run: Path, *, ema: bool = False, environment: RankEnvironment | None = None) -> Iterator[Speaker]:
    """A checkpoint as a speaker, as long as this block lasts; see :func:`generate`.

    Raises:
        LaunchError: there are more or fewer ranks than the configuration divides the model among.
    """
    device = device_seam.choose_device("auto")
    device_seam.preload(device)
    from megatron_slm.train import recovery

    first = environment is None or environment.rank == 0
    found = recovery.find(run, hashes=first)
    if found.warning is not None and first:
        print(f"warning: {found.warning}", file=sys.stderr)
    config = load(found.path / "config.yaml").config
    parallel = ParallelConfig() if environment is None else speaking_layout(config)
    if environment is not None and environment.world_size != parallel.smallest_world_size:
        raise LaunchError(
            f"{run} speaks on {parallel.smallest_world_size} ranks, tensor_model_parallel_size "
            f"{parallel.tensor_model_parallel_size} x pipeline_model_parallel_size "
            f"{parallel.pipeline_model_parallel_size}, but {environment.launcher} has started "
            f"{environment.world_size}. Start as many, or give --one-rank."
        )
    tokenizer = Tokenizer.open(find_tokenizer(found.path / "tokenizer"), expected_hash=found.state.tokenizer_hash)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    with built_model(
        found.path, config, parallel, environment=environment, vocab_size=vocab_size, device=device, ema=ema
    ) as built:
        # The model may be wider than the tokenizer, whose ids alone have a text.
        yield Speaker(built, tokenizer, min(vocab_size, tokenizer.vocab_size), config.model.position_limit)


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
    alone = ParallelConfig()
    with built_model(source, config, alone, environment=None, vocab_size=vocab_size, device=device, ema=ema) as built:
        yield built.chunks[0]


@contextmanager
def built_model(
    source: Path,
    config: RunConfig,
    parallel: ParallelConfig,
    *,
    environment: RankEnvironment | None,
    vocab_size: int,
    device: str,
    ema: bool,
) -> Iterator[Built]:
    """This rank's part of the model of :func:`model_on_one_rank` under a layout. Collective.

    Raises:
        CheckpointError: as there, or it has no words.
    """
    if config.stage == "reward":
        raise CheckpointError(
            f"{source} is a reward model: it ends with a number and has no words. Name a model of another stage; its "
            "accuracy on held-out pairs is in its run's log (train.eval_iters), and rollout.reward_model uses it."
        )
    device_seam.preload(device)
    from megatron_slm.model.core_config import transformer_config
    from megatron_slm.model.gpt import build_chunks
    from megatron_slm.parallel.groups import process_groups
    from megatron_slm.parallel.specs import choose_spec
    from megatron_slm.train import checkpoint
    from megatron_slm.train.random_state import RandomState

    rank, local_rank, size = (0, 0, 1)
    if environment is not None:
        rank, local_rank, size = environment.rank, environment.local_rank, environment.world_size
    bound = device_seam.bind(device, local_rank)
    with (
        meeting_place(environment) as master,
        process_groups(parallel, device=device, rank=rank, world_size=size, master=master) as groups,
    ):
        RandomState(0, dp_rank=0, pp_rank=groups.pp.rank())
        core = transformer_config(config.model, parallel, config.precision, config.train, device=device)
        # With packed documents the attention is ours everywhere, and ours has the cache.
        spec, norm, _ = choose_spec(device, config.model, packed_documents=True)
        chunks = build_chunks(
            config.model,
            core,
            groups,
            vocab_size=vocab_size,
            seed=0,
            spec=(spec, norm),
            device=bound,
            lora=config.lora,
        )
        checkpoint.load_weights(source, chunks, ema=ema)
        yield Built([chunk.eval() for chunk in chunks], groups, bound)


@contextmanager
def meeting_place(environment: RankEnvironment | None) -> Iterator[tuple[str, int]]:
    """Host and port at which the ranks meet: the launcher's, or a free one of this machine for one rank alone."""
    if environment is not None:
        yield environment.master_addr, environment.master_port
        return
    with reserve_port("127.0.0.1") as reserved:
        yield "127.0.0.1", reserved.getsockname()[1]


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
