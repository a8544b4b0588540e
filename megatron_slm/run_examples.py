"""The data of a run after pretraining: compiled examples and prompts, in the same order and under the same cursor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.corpus import HASH_LIMIT_BYTES
from megatron_slm.data.examples.curriculum import curriculum, curriculum_order
from megatron_slm.data.examples.loader import PromptLoader, RowLoader
from megatron_slm.data.examples.prompts import Prompts
from megatron_slm.data.examples.rows import CorpusRows, ExampleRows, open_rows
from megatron_slm.data.examples.store import ExampleStore
from megatron_slm.data.mixture import MixtureOrder, Source
from megatron_slm.data.shares import configured_phases
from megatron_slm.errors import DataError
from megatron_slm.run_data import Data, data_seed, kept_data, open_tokenizer, refuse_twins, source_paths

PAIRS, PROMPTS = ("reward", "dpo"), ("ppo", "grpo")
"""Stages that read preferences, and those that read prompts."""


def open_examples(config: RunConfig, *, verify: bool = False) -> Data:
    """Every source's rows or prompts, and their tokenizer, whose hash must be the one in each of them.

    Args:
        verify: compare the hashes of small sources too, not the sizes of files alone.

    Raises:
        DataError: something is missing, damaged, of the wrong kind or does not belong together.
    """
    if config.replay.batches_of is not None:
        return kept_data(config)
    paths, seed = source_paths(config), data_seed(config)
    train = {name: _open(config, path / "train", verify=verify) for name, path in paths.items()}
    if config.reward.reward_margin:
        require_margins({name: _store(one).margins for name, one in train.items()})
    held_out = paths if config.train.eval_iters else {}
    valid = {name: _open(config, path / "valid", verify=verify) for name, path in held_out.items()}
    stores = [_store(one) for one in (*train.values(), *valid.values())]
    tokenizer = open_tokenizer(config, next(iter(paths.values())), stores)
    if config.data.curriculum is not None:
        ((name, rows),) = train.items()
        if not isinstance(rows, ExampleRows):
            raise DataError(
                f"data.curriculum = {config.data.curriculum}: {paths[name]} holds text, which has no order."
            )
        parts = curriculum(name, rows, config.data.curriculum_parts, sorted_by=config.data.curriculum)
        return Data(parts, valid, tokenizer, curriculum_order(parts, seed))
    sources = [Source(name, one.order(seed)) for name, one in train.items()]
    refuse_twins(sources)
    phases = configured_phases(config.data, {name: _tokens(one) for name, one in train.items()})
    return Data(train, valid, tokenizer, MixtureOrder(tuple(sources), phases))


def require_margins(margins: Mapping[str, np.ndarray]) -> None:
    """Refuse margins that are to be used and that no pair has.

    Args:
        margins: of every source's answers, [documents].

    Raises:
        DataError: all of them are 0.
    """
    if not any(each.any() for each in margins.values()):
        raise DataError(
            f"reward.reward_margin = true, but no pair of {', '.join(margins)} has a margin other than 0. Compile rows "
            'with "margin", or leave it out.'
        )


def example_loader(config: RunConfig, data: Data, groups: Any) -> RowLoader | PromptLoader:
    """Training rows, or prompts, of this data-parallel rank."""
    place = {
        "micro_batch_size": config.train.micro_batch_size,
        "data_parallel_rank": groups.dp.rank(),
        "data_parallel_size": groups.dp.size(),
    }
    if config.stage in PROMPTS:
        return PromptLoader(data.train, **place)
    return RowLoader(data.train, seq_length=config.model.seq_length, **place)


def _open(config: RunConfig, directory: Path, *, verify: bool) -> ExampleRows | CorpusRows | Prompts:
    """One split of one source, of the kind that the stage reads."""
    how, length = "hash" if verify and _size(directory) <= HASH_LIMIT_BYTES else "size", config.model.seq_length
    if config.stage in PROMPTS:
        return Prompts(ExampleStore.open(directory, how), length, config.rollout.max_new_tokens)
    rows = open_rows(
        directory,
        length,
        packed=config.data.pack_rows,
        trained=config.data.train_on,
        pooled=config.stage == "reward",
        verify=how,
    )
    kind = rows.store.kind if isinstance(rows, ExampleRows) else "corpus"
    if (kind == "preference") != (config.stage in PAIRS):
        wanted = "preferences (--kind preference)" if config.stage in PAIRS else "chats (--kind chat) or text"
        raise DataError(f"{directory} holds {kind} examples, but stage {config.stage} reads {wanted}.")
    return rows


def _store(source: ExampleRows | CorpusRows | Prompts) -> Any:
    return source.corpus if isinstance(source, CorpusRows) else source.store


def _tokens(source: ExampleRows | CorpusRows | Prompts) -> int:
    """What the default shares of a mixture are proportional to."""
    tokens: int = _store(source).num_tokens
    return tokens


def _size(directory: Path) -> int:
    try:
        return sum(file.stat().st_size for file in directory.iterdir())
    except OSError:
        return 0  # the source itself says what is missing
