"""The data of a run: corpora, tokenizer and order, and what makes two runs the same run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_slm.config import mixture_text
from megatron_slm.config.load import load
from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.batch import Samples
from megatron_slm.data.corpus import HASH_LIMIT_BYTES, Corpus
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.mixture import MixtureOrder, Source
from megatron_slm.data.order import SampleOrder
from megatron_slm.data.replay import ReplayedSamples
from megatron_slm.data.resume import check_resume
from megatron_slm.data.shares import configured_phases
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import CheckpointError, DataError
from megatron_slm.replay.batches import KeptSamples
from megatron_slm.replay.capsule import Capsule
from megatron_slm.replay.kept import TOKENIZER, kept_steps
from megatron_slm.train import recovery
from megatron_slm.train.origin import shape
from megatron_slm.train.run_directory import RunDirectory

GOVERNED_BY_CURSOR = (
    "data_path", "sources", "weights", "temperature", "phases", "loss_aware_strength", "replay_run", "replay_share",
    "length_schedule",
)  # fmt: skip
"""Keys that say which samples come when, and how long their windows are. They are compared by what they amount to for
the samples already read (``data/resume.py``), and may change for samples to come; paths are no identity at all."""

SAME_SAMPLES = ("loader",)
"""Keys that change nothing of what a run reads."""

ONLY_LATER = ("pack_rows", "train_on", "curriculum", "curriculum_parts")
"""Keys that pretraining does not read."""


@dataclass(frozen=True)
class Data:
    """What a run reads: by source, the samples it trains on and, where it validates, the held-out split; the tokenizer
    they were all made with; the order of training.

    Sources are corpora (``Samples``) in pretraining, and rows or prompts (``data/examples``) after it.
    """

    train: Mapping[str, Any]
    valid: Mapping[str, Any]
    tokenizer: Tokenizer
    order: MixtureOrder


def open_data(config: RunConfig, *, verify: bool = False) -> Data:
    """Every source's splits and their tokenizer, whose hash must be the one in each of them.

    Args:
        verify: compare the hashes of corpora up to ``HASH_LIMIT_BYTES`` too, not the sizes of files alone.

    Raises:
        DataError: something is missing, damaged or does not belong together.
    """
    if config.replay.batches_of is not None:
        return kept_data(config)
    paths, length = source_paths(config), config.model.seq_length
    train = {name: open_corpus(path / "train", verify=verify) for name, path in paths.items()}
    held_out = paths if config.train.eval_iters else {}
    valid = {name: open_corpus(path / "valid", verify=verify) for name, path in held_out.items()}
    tokenizer = open_tokenizer(config, next(iter(paths.values())), [*train.values(), *valid.values()])
    for corpus in (*train.values(), *valid.values()):
        if not corpus.num_samples(length):
            raise DataError(
                f"{corpus.directory} has {corpus.num_tokens} tokens, too few for one sample of model.seq_length "
                f"{length}; prepare more text, lower model.seq_length, or set train.eval_iters=0"
            )
    seed = data_seed(config)
    sources = [
        Source(name, SampleOrder(corpus.num_samples(length), seed, corpus.digest, length))
        for name, corpus in train.items()
    ]
    samples: dict[str, Samples] = dict(train)
    if config.data.replay_run is not None:
        replayed = open_replay(config, tokenizer, verify=verify)
        samples[mixture_text.REPLAY] = replayed
        sources.append(Source(mixture_text.REPLAY, replayed.order(seed)))
    refuse_twins(sources)
    phases = configured_phases(config.data, {name: corpus.num_tokens for name, corpus in train.items()})
    return Data(samples, valid, tokenizer, MixtureOrder(tuple(sources), phases))


def kept_data(config: RunConfig) -> Data:
    """What a recording says of its run's data, of which nothing but the kept batches is there.

    Raises:
        CheckpointError: the recording is not whole.
        DataError: its tokenizer is not there.
    """
    recording = Capsule.of(Path(str(config.replay.batches_of)))
    manifest = recording.manifest(max(kept_steps(recording.folder, recording.ranks[0]), default=0))
    tokenizer = Tokenizer.open(
        config.tokenizer.tokenizer_model or recording.folder / TOKENIZER, manifest["data"]["tokenizer_hash"]
    )
    samples = {
        name: KeptSamples(name, tokenizer.eod_id, record) for name, record in manifest["data"]["sources"].items()
    }
    return Data(samples, {}, tokenizer, Cursor.from_dict(manifest["cursor"]).order)


def source_paths(config: RunConfig) -> dict[str, Path]:
    """The prepared corpus of each source; a single one is named as its directory is."""
    if config.data.sources:
        return {name: Path(path) for name, path in mixture_text.sources(config.data.sources).items()}
    assert config.data.data_path is not None, "config/files.py refuses a run without data"
    path = Path(config.data.data_path)
    return {path.resolve().name or "corpus": path}


def open_corpus(directory: Path, *, verify: bool) -> Corpus:
    """One split, hashed where that is asked for and takes seconds."""
    corpus = Corpus.open(directory)
    return Corpus.open(directory, verify="hash") if verify and corpus.num_bytes <= HASH_LIMIT_BYTES else corpus


def open_replay(config: RunConfig, tokenizer: Tokenizer, *, verify: bool) -> ReplayedSamples:
    """The samples that the run ``data.replay_run`` has trained on up to its newest checkpoint, out of its own corpora.

    Raises:
        DataError: there is no such run, it has another tokenizer or sequence length, or its corpora are not there any
            more as they were.
    """
    named = f"data.replay_run={config.data.replay_run}"
    try:
        found = recovery.find(Path(str(config.data.replay_run)), hashes=False)  # its weights are not read
        cursor = Cursor.from_dict(found.state.cursor)
        earlier = load(found.path / "config.yaml", ["train.eval_iters=0", "train.eval_interval=null"]).config
        data = open_data(_where_it_read(earlier, found.path), verify=verify)
        cursor = check_resume(cursor, Cursor.start(data.order, data.tokenizer.hash)).cursor
    except (CheckpointError, DataError) as error:
        raise DataError(f"{named} cannot be replayed: {error}") from error
    if data.tokenizer.hash != tokenizer.hash:
        raise DataError(f"{named} has another tokenizer ({data.tokenizer.hash}) than this run ({tokenizer.hash}).")
    if cursor.seq_length != config.model.seq_length:
        raise DataError(
            f"{named} has samples of {cursor.seq_length} tokens, this run of {config.model.seq_length}; set "
            f"model.seq_length={cursor.seq_length}, or give its corpora as data.sources."
        )
    replayed = ReplayedSamples(data.train, cursor)
    if not replayed.num_samples:
        raise DataError(f"{named} has trained on nothing yet; leave data.replay_run out.")
    return replayed


def _where_it_read(config: RunConfig, checkpoint: Path) -> RunConfig:
    """The configuration of a checkpoint with the directories that its run has noted, where they are still there.

    Paths of a configuration may be relative to another directory than the present one.
    """
    try:
        noted = json.loads((checkpoint.parent.parent / "data.json").read_text(encoding="utf-8"))["sources"]
        known = {name: Path(one["directory"]) for name, one in noted.items() if "directory" in one}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return config
    paths = {
        name: known[name] if name in known and known[name].is_dir() else path
        for name, path in source_paths(config).items()
    }
    if not config.data.sources:
        return replace(config, data=replace(config.data, data_path=str(next(iter(paths.values())))))
    return replace(config, data=replace(config.data, sources=tuple(f"{name}={path}" for name, path in paths.items())))


def saved_cursor(config: RunConfig, data: Data) -> Cursor | None:
    """Where the newest checkpoint of the run stands, with the shares it has decided itself; None where there is none.

    Raises:
        CheckpointError: the run's directory holds a run over other samples than those of ``config``.
    """
    checkpoints = RunDirectory(Path(config.log.runs_dir) / str(config.name)).checkpoints
    found = recovery.newest_whole(checkpoints, identity=None, hashes=False)  # its weights are not read
    if found is None:
        return None
    return check_resume(Cursor.from_dict(found.state.cursor), Cursor.start(data.order, data.tokenizer.hash)).cursor


def data_seed(config: RunConfig) -> int:
    """Seed of the sample order."""
    return config.train.seed if config.data.data_seed is None else config.data.data_seed


def identity(config: RunConfig, data: Data) -> dict[str, Any]:
    """What makes two runs the same run: model, options of the data and seed, derived values filled in.

    Which corpora a checkpoint has read is in its cursor, and a resume compares that (``data/resume.py``).
    """
    later = config.stage != "pretrain"
    known = {*GOVERNED_BY_CURSOR, *SAME_SAMPLES, *(() if later else ONLY_LATER)}
    options = {key: value for key, value in asdict(config.data).items() if key not in known}
    return {
        **({"stage": config.stage} if later else {}),
        "model": {
            **asdict(config.model),
            **shape(config.model),
            "max_position_embeddings": config.model.position_limit,
            "vocab_size": config.model.vocab_size or data.tokenizer.vocab_size,
        },
        "data": {
            **options,
            "data_seed": data_seed(config),
            "tokenizer_hash": data.tokenizer.hash,
        },
        "seed": config.train.seed,
        **({"lora": asdict(config.lora)} if config.lora.lora_rank else {}),
    }


def data_record(data: Data) -> dict[str, Any]:
    """What the run's directory keeps of its data: of each source, where it came from, its licence and its hash."""
    record: dict[str, Any] = {"tokenizer_hash": data.tokenizer.hash, "sources": {}}
    for name, samples in data.train.items():
        if isinstance(samples, Corpus):
            record["sources"][name] = {
                "directory": str(samples.directory.parent.absolute()),
                "digest": samples.digest,
                "documents": samples.num_documents,
                "tokens": samples.num_tokens,
                "made_from": samples.sources,
            }
        elif isinstance(samples, KeptSamples):
            record["sources"][name] = samples.record
        elif isinstance(samples, ReplayedSamples):
            record["sources"][name] = {"digest": samples.digest, "replayed_samples": samples.num_samples}
        else:
            record["sources"][name] = {"digest": samples.digest, "samples": samples.num_samples, **_place_of(samples)}
    return record


def _place_of(rows: Any) -> dict[str, str]:
    """Where rows or prompts lie, and the digest of what lies there."""
    store = getattr(rows, "store", None) or rows.corpus
    return {"directory": str(store.directory.parent.absolute()), "content": store.digest}


def open_tokenizer(config: RunConfig, path: Path, corpora: Sequence[Any]) -> Tokenizer:
    """The tokenizer of all ``corpora``, by default the one in ``path``."""
    for corpus in corpora:
        one, other = ((known.tokenizer_hash, known.eod_id) for known in (corpora[0], corpus))
        if one != other:
            raise DataError(
                f"{corpora[0].directory} and {corpus.directory} were made with different tokenizers (hash {one[0]} "
                f"with end-of-document token {one[1]}, and {other[0]} with {other[1]}): the same ids mean other text. "
                "Prepare one of them again with the other's tokenizer (--tokenizer-model)."
            )
    model = Path(config.tokenizer.tokenizer_model or path / "tokenizer")
    return Tokenizer.open(model, expected_hash=corpora[0].tokenizer_hash)


def refuse_twins(sources: list[Source]) -> None:
    """Two sources of one content are one source, named twice.

    Raises:
        DataError: names both.
    """
    names: dict[str, str] = {}
    for source in sources:
        if (twin := names.setdefault(source.order.digest, source.name)) != source.name:
            raise DataError(
                f"The sources {twin} and {source.name} hold the same tokens; give them once, with both weights."
            )
