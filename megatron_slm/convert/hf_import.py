"""A Hugging Face model's directory -> a checkpoint with weights alone, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from megatron_slm.config import rules
from megatron_slm.config.load import load
from megatron_slm.config.run_config import RunConfig
from megatron_slm.config.values import show
from megatron_slm.convert import logits
from megatron_slm.convert.blocks import RECORD, read_block, same_bits
from megatron_slm.convert.model_files import DTYPES, ModelFiles
from megatron_slm.convert.output import refuse_existing, versions, whole_or_nothing
from megatron_slm.convert.report import Report, TensorRow
from megatron_slm.data.tokenizer import FILE_NAMES, Tokenizer
from megatron_slm.errors import CheckpointError
from megatron_slm.model.config import ModelConfig
from megatron_slm.model.hf import IGNORED_SUFFIXES, OUTPUT_PART, Block, blocks, without_prefix
from megatron_slm.model.hf_config import Architecture, read_config
from megatron_slm.train import manifest
from megatron_slm.train.payload_index import read_index
from megatron_slm.train.payload_stream import BlockReader, PayloadWriter
from megatron_slm.train.saved_state import STATE_FILE, SavedState

LINEARS = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
"""Matrices beside which core asks a checkpoint for an object, the extra state, that is empty outside fp8."""


class Source:
    """A Hugging Face directory whose every tensor is known to be the one that its config.json asks for.

    Attributes:
        architecture: of its config.json.
        blocks: of the checkpoint that it becomes.
        dtype: of most of its tensors, by torch's name.
        notes: what was left out.

    Raises:
        CheckpointError: a tensor is missing, too many, or of another shape or a quantised format; or as of
            ``read_config`` and ``ModelFiles``.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.architecture = read_config(directory)
        section = self.architecture.section
        self.config = _run_config(self.architecture, directory)
        self.model: ModelConfig = self.config.model
        self.blocks = blocks(self.model, self.architecture.model_type, section["vocab_size"])
        self._files = ModelFiles(directory)
        self._stored = self._match()
        self._require_shapes()
        self.notes = [*self.architecture.notes, *self._tied_output()]
        if self.architecture.unread:
            self.notes.append(f"Keys of config.json that were not looked at: {', '.join(self.architecture.unread)}.")
        sizes: dict[str, int] = {}
        for stored in self._stored.values():
            dtype = self._files.described[stored].dtype
            sizes[dtype] = sizes.get(dtype, 0) + 1
        self.dtype = max(sizes, key=lambda name: sizes[name])

    def read(self, name: str) -> Tensor:
        """One tensor by the name it has in a model with a head."""
        return self._files.read(self._stored[name])

    def _match(self) -> dict[str, str]:
        """Name in the model -> name in the files, for every part of every block."""
        wanted = frozenset(part.name for block in self.blocks for part in block.parts)
        known = wanted | {OUTPUT_PART}
        there = {without_prefix(name, known): name for name in self._files.described}
        if missing := sorted(wanted - set(there)):
            raise CheckpointError(
                f"{self.directory} lacks {missing[0]}{_more(missing)}, which its config.json asks for; download the "
                "model anew, or mend config.json"
            )
        tied = {OUTPUT_PART} - wanted
        extra = sorted(
            name for name in there if name not in wanted and name not in tied and not name.endswith(IGNORED_SUFFIXES)
        )
        if extra:
            raise CheckpointError(
                f"{self.directory} has {there[extra[0]]}{_more(extra)}, for which a {self.architecture.model_type} of "
                "its config.json has no place; it is another architecture, or mend config.json"
            )
        return {name: there[name] for name in wanted | (tied & set(there))}

    def _require_shapes(self) -> None:
        formats: dict[str, str] = {}
        for stored, part in ((block.name, part) for block in self.blocks for part in block.parts):
            found = self._files.described[self._stored[part.name]]
            if found.shape != part.shape:
                raise CheckpointError(
                    f"{found.file}: {self._stored[part.name]} has the shape {list(found.shape)}, and config.json asks "
                    f"for {list(part.shape)}; download the model anew, or mend config.json"
                )
            if found.dtype not in DTYPES.values():
                raise CheckpointError(
                    f"{found.file}: {self._stored[part.name]} is {found.dtype}; the formats read are "
                    f"{', '.join(DTYPES.values())}: save the model unquantised"
                )
            if (known := formats.setdefault(stored, found.dtype)) != found.dtype:
                raise CheckpointError(
                    f"{found.file}: {self._stored[part.name]} is {found.dtype} and the like of other layers {known}; "
                    "save the model in one dtype"
                )

    def _tied_output(self) -> list[str]:
        """A model with tied embeddings may hold the matrix twice; both must be the same."""
        if self.model.untie_embeddings_and_output_weights or OUTPUT_PART not in self._stored:
            return []
        embedding = self.blocks[0].parts[0].name
        if not same_bits(self.read(OUTPUT_PART), self.read(embedding)):
            raise CheckpointError(
                f"{self.directory} ties its embeddings (tie_word_embeddings), but {OUTPUT_PART} is not equal to "
                f"{embedding}; set tie_word_embeddings to false in config.json where they are two matrices"
            )
        return [f"{OUTPUT_PART} is {embedding} once more and was left out."]


def import_model(directory: Path, output: Path, *, compare_logits: bool, eod_token: str | None = None) -> Report:
    """Write checkpoint ``output`` from a Hugging Face model, whole or not at all.

    Args:
        compare_logits: with transformers, which must be installed.
        eod_token: special token that ends a document, where none of the well-known ones is in the tokenizer.

    Raises:
        CheckpointError, ConfigError, DataError: the model, its tokenizer or ``output`` is refused.
        ConversionError: the checkpoint does not give back what it was made from; it is not published.
    """
    refuse_existing(output)
    if (named := manifest.PUBLISHED.fullmatch(output.name)) and int(named[1]) != 0:
        raise CheckpointError(f"{output.name} is a name for step {int(named[1])}, an import is of step 0: iter_0000000")
    source = Source(directory)
    tokenizer = _tokenizer(directory, eod_token)
    vocab_size = source.architecture.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        source.notes.append(
            f"The tokenizer has {tokenizer.vocab_size} entries and the model {vocab_size}: its last ids have no "
            "embedding."
        )
    if compare_logits:
        logits.require_comparable(source.model, vocab_size)
    report = _new_report(source)
    with whole_or_nothing(output) as temporary:
        _write_payload(source, temporary)
        _write_files(source, tokenizer, temporary)
        report.tensors = _round_trip(source, temporary)
        report.require()
        if compare_logits:
            report.logits = logits.compare(temporary, directory, source.config, vocab_size=vocab_size)
            report.require()
        else:
            report.without_logits = "--no-logits was given"
        report.write(temporary)
        manifest.seal(temporary, step=0, identity="")
    return report


def extra_states(expected: list[Block]) -> list[str]:
    """Names of the objects that core asks for beside the tensors."""
    return [
        f"{block.name.removesuffix('weight')}_extra_state/shard_{_dotted(block.index)}_{_dotted(block.counts)}"
        for block in expected
        if block.name.endswith(LINEARS)
    ]


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _run_config(architecture: Architecture, directory: Path) -> RunConfig:
    """The configuration of the checkpoint, which any run may start from."""
    overrides = [f"model.{field}={show(value)}" for field, value in architecture.section.items() if value is not None]
    config = load(None, overrides).config
    if found := rules.violations(config):
        raise CheckpointError(f"{directory} has sizes that this program cannot build: {' '.join(found)}")
    return config


def _tokenizer(directory: Path, eod_token: str | None) -> Tokenizer | None:
    """The directory's tokenizer; None where it has none. A tokenizer.model lacks the tokens that were added later."""
    for name in reversed(FILE_NAMES):
        if (directory / name).is_file():
            return Tokenizer.open(directory / name, eod_token=eod_token)
    return None


def _new_report(source: Source) -> Report:
    vocab_size = source.architecture.vocab_size
    return Report(
        direction="hf-import",
        source=str(source.directory.resolve()),
        model_type=source.architecture.model_type,
        dtype=source.dtype,
        vocab_size=vocab_size,
        padding=source.model.padded_vocab_size(vocab_size) - vocab_size,
        compared="Each tensor was taken out of the checkpoint again and compared with the source bit by bit; padding "
        "rows are zero.",
        versions=versions(),
        notes=source.notes,
    )


def _write_payload(source: Source, directory: Path) -> None:
    writer = PayloadWriter(directory)
    for block in source.blocks:
        data = block.join([source.read(part.name) for part in block.parts])
        ones = (1,) * len(block.index)
        offsets = block.index + (0,) * len(block.shape)
        writer.block(block.name, data.view(ones + block.shape), offsets=offsets, shape=block.global_shape)
    for name in extra_states(source.blocks):
        writer.value(name, [None])
    writer.close()


def _write_files(source: Source, tokenizer: Tokenizer | None, directory: Path) -> None:
    """``config.yaml``, ``tokenizer/`` and ``state.json``."""
    section = "".join(f"  {field}: {show(value)}\n" for field, value in source.architecture.section.items())
    half = "precision:\n  bf16: true\n" if source.dtype == "bfloat16" else ""
    (directory / "config.yaml").write_text(f"model:\n{section}{half}", encoding="utf-8")
    (directory / "tokenizer").mkdir()
    if tokenizer is not None:
        tokenizer.save(directory / "tokenizer")
    origin = {
        "model_type": source.architecture.model_type,
        "tokens": dict(source.architecture.tokens),
        "directory": str(source.directory.resolve()),
    }
    state = SavedState(
        step=0,
        consumed_samples=0,
        cursor={},
        layout={},
        params_dtype=source.dtype,
        tokenizer_hash=tokenizer.hash if tokenizer is not None else "",
        records={RECORD: origin},
    )
    (directory / STATE_FILE).write_text(state.to_json(), encoding="utf-8")


def _round_trip(source: Source, directory: Path) -> list[TensorRow]:
    """Every source tensor, taken out of the written checkpoint."""
    reader = BlockReader(directory, read_index(directory))
    rows = []
    for block in source.blocks:
        stored = read_block(reader, block)
        is_padded_with_zeros = not stored[block.rows :].any()
        for part, piece in zip(block.parts, block.split(stored), strict=True):
            equal = same_bits(piece, source.read(part.name)) and is_padded_with_zeros
            rows.append(TensorRow(part.name, part.shape, str(piece.dtype).removeprefix("torch."), equal))
    return rows


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
