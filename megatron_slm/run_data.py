"""The data of a run: corpora, tokenizer and order, and what makes two runs the same run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.corpus import HASH_LIMIT_BYTES, Corpus
from megatron_slm.data.order import SampleOrder
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import DataError
from megatron_slm.train.origin import shape


@dataclass(frozen=True)
class Data:
    """The corpus of a run: both splits, the tokenizer they were made with, and the order of training."""

    train: Corpus
    valid: Corpus | None
    tokenizer: Tokenizer
    order: SampleOrder


def open_data(config: RunConfig, *, verify: bool = False) -> Data:
    """Both splits and their tokenizer, whose hash must be the one in each of them.

    Args:
        verify: compare the hashes of corpora up to ``HASH_LIMIT_BYTES`` too, not the sizes of files alone.

    Raises:
        DataError: something is missing, damaged or does not belong together.
    """
    assert config.data.data_path is not None, "config/files.py refuses a run without data.data_path"
    path = Path(config.data.data_path)
    train = open_corpus(path / "train", verify=verify)
    valid = open_corpus(path / "valid", verify=verify) if config.train.eval_iters else None
    model = Path(config.tokenizer.tokenizer_model or path / "tokenizer" / "tokenizer.model")
    for corpus in filter(None, (train, valid)):
        tokenizer = Tokenizer.open(model, expected_hash=corpus.tokenizer_hash)
        if not corpus.num_samples(config.model.seq_length):
            raise DataError(
                f"{corpus.directory} has {corpus.num_tokens} tokens, too few for one sample of model.seq_length "
                f"{config.model.seq_length}; prepare more text, lower model.seq_length, or set train.eval_iters=0"
            )
    order = SampleOrder(
        train.num_samples(config.model.seq_length), data_seed(config), train.digest, config.model.seq_length
    )
    return Data(train, valid, tokenizer, order)


def open_corpus(directory: Path, *, verify: bool) -> Corpus:
    """One split, hashed where that is asked for and takes seconds."""
    corpus = Corpus.open(directory)
    return Corpus.open(directory, verify="hash") if verify and corpus.num_bytes <= HASH_LIMIT_BYTES else corpus


def data_seed(config: RunConfig) -> int:
    """Seed of the sample order."""
    return config.train.seed if config.data.data_seed is None else config.data.data_seed


def identity(config: RunConfig, data: Data) -> dict[str, Any]:
    """What makes two runs the same run: model, data and seed, derived values filled in."""
    options = {key: value for key, value in asdict(config.data).items() if key != "data_path"}
    return {
        "model": {
            **asdict(config.model),
            **shape(config.model),
            "max_position_embeddings": config.model.position_limit,
            "vocab_size": config.model.vocab_size or data.tokenizer.vocab_size,
        },
        "data": {
            **options,
            "data_seed": data_seed(config),
            "dataset_digest": data.train.digest,
            "tokenizer_hash": data.tokenizer.hash,
        },
        "seed": config.train.seed,
    }
