"""The files that a run reads before its first step: are they there? Only the corpora's indices are opened."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_slm.config import mixture_text
from megatron_slm.config.facts import Facts
from megatron_slm.config.files_stage import index_of, preparation, stage_inputs
from megatron_slm.config.run_config import RunConfig
from megatron_slm.errors import ConfigError


def missing_inputs(config: RunConfig, *, provenance: Mapping[str, str] | None = None) -> list[str]:
    """Every input of ``config`` that is not on this machine, each with the way to make it.

    Args:
        config: a resolved configuration.
        provenance: source of each value, named in the sentences.
    """
    facts = Facts(config, 1, provenance or {})
    if config.replay.batches_of is not None:
        return [*_kept_batches(facts), *_tokenizer(facts), *_pretrained(facts)]
    return [*_corpora(facts), *stage_inputs(facts), *_tokenizer(facts), *_replayed(facts), *_pretrained(facts)]


def _corpora(facts: Facts) -> Iterator[str]:
    """The prepared corpora, with the index of their training splits."""
    data = facts.config.data
    if data.sources:
        try:
            paths = mixture_text.sources(data.sources)
        except ConfigError:
            return  # a rule on the configuration speaks already
        for name, path in paths.items():
            yield from _corpus(facts, path, "data.sources", f", source {name}")
        yield from _together(facts, paths)
    elif data.data_path is not None:
        yield from _corpus(facts, data.data_path, "data.data_path")
    else:
        text = facts.config.stage == "pretrain"
        name, needs = ("corpus", "training needs a prepared corpus") if text else ("data", "the stage needs examples")
        yield (
            f"data.data_path is not set: {needs}. Make one with "
            f"`{preparation(facts.config.stage).format(path=name)}`, then add data.data_path={name}; or name several "
            "with data.sources."
        )


def _corpus(facts: Facts, path: str, key: str, source: str = "") -> Iterator[str]:
    """One prepared corpus; ``source`` says which of several it is."""
    directory = Path(path)
    cited = facts.cite(key) + source
    remedy = f"`{preparation(facts.config.stage).format(path=path)}`"
    if not directory.is_dir():
        yield f"{cited}: there is no such directory. Make it with {remedy}."
        return
    index = directory / "train" / "index.json"
    if not index.is_file():
        yield f"{cited} is no prepared corpus: {index} is missing. Make it again with {remedy}."
        return
    try:
        tokens = int(json.loads(index.read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{cited} is damaged: {index} cannot be read ({error!r}). Make it again with {remedy}."
        return
    if tokens > (facts.config.model.vocab_size or tokens):
        yield (
            f"{facts.cite('model.vocab_size', key)}{source}: the corpus's tokenizer has {tokens} entries, more "
            f"than the model. Set model.vocab_size={tokens}, leave it out, or prepare the corpus with the model's "
            "tokenizer."
        )


def _together(facts: Facts, paths: Mapping[str, str]) -> Iterator[str]:
    """Sources were made with one tokenizer, and hold different tokens."""
    indices = {name: index for name, path in paths.items() if (index := index_of(path)) is not None}
    cited = facts.cite("data.sources")
    first = next(iter(indices), "")
    digests: dict[str, str] = {}
    for name, index in indices.items():
        if any(index.get(key) != indices[first].get(key) for key in ("tokenizer_hash", "eod_id")):
            yield (
                f"{cited}: {first} and {name} were made with different tokenizers, so the same ids mean other text. "
                f"Prepare {name} again with --tokenizer-model, the file in {paths[first]}/tokenizer."
            )
        digest = index.get("digest")
        if digest is not None and (twin := digests.setdefault(str(digest), name)) != name:
            yield f"{cited}: {twin} and {name} hold the same tokens. Give them once, with both weights."


def _tokenizer(facts: Facts) -> Iterator[str]:
    """The sentencepiece model, where one is named."""
    path = facts.config.tokenizer.tokenizer_model
    if path is not None and not Path(path).is_file():
        yield (
            f"{facts.cite('tokenizer.tokenizer_model')}: there is no such file. Correct the path, or leave it out to "
            "take "
            "the tokenizer inside data.data_path."
        )


def _replayed(facts: Facts) -> Iterator[str]:
    """The run whose samples come again, where one is named."""
    path = facts.config.data.replay_run
    if path is not None and not Path(path).is_dir():
        yield f"{facts.cite('data.replay_run')}: there is no such directory. Name a run's directory (runs/NAME)."


def _kept_batches(facts: Facts) -> Iterator[str]:
    """The recording whose batches are read in place of a corpus."""
    path = Path(str(facts.config.replay.batches_of))
    if not (path / "batches").is_dir():
        yield (
            f"{facts.cite('replay.batches_of')}: there are no kept batches. Name the replay/ of a run that was "
            "recorded with replay.keep_batches."
        )


def _pretrained(facts: Facts) -> Iterator[str]:
    """The checkpoint directory, where one is named."""
    path = facts.config.checkpoint.pretrained_checkpoint
    if path is not None and not Path(path).is_dir():
        yield (
            f"{facts.cite('checkpoint.pretrained_checkpoint')}: there is no such directory. Name a run's checkpoints "
            "directory (runs/NAME/checkpoints) or one iter_* directory in it."
        )
