"""The last pass: what is kept of the finished chunks becomes splits, beside the manifest that says what they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_slm.data.documents import Source, in_valid
from megatron_slm.data.examples.encoding import ExampleEncoder
from megatron_slm.data.examples.evaluation import EvaluationTexts
from megatron_slm.data.examples.making import LeftOut, Unit, unpack
from megatron_slm.data.examples.request import ExamplesRequest, Options
from megatron_slm.data.examples.rows import ExampleRows
from megatron_slm.data.examples.store import ExampleStore
from megatron_slm.data.examples.template import TEMPLATE_NAME
from megatron_slm.data.examples.writer import SplitWriter
from megatron_slm.data.manifest import write_manifest
from megatron_slm.data.preparation.staging import Staging, writing
from megatron_slm.data.quality.config import QualityConfig
from megatron_slm.data.quality.duplicates import Duplicates
from megatron_slm.data.quality.evidence import NUM_EXAMPLES
from megatron_slm.data.quality.screen import Screened
from megatron_slm.data.shards import file_sha256
from megatron_slm.data.tokenizer import COMPANIONS_FOLDER, Tokenizer
from megatron_slm.errors import DataError

REASONS = {"exact": "duplicate", "near": "near duplicate"}


@dataclass
class Findings:
    """What became of the rows.

    Attributes:
        rows, kept: by place of the source.
        left_out: by reason.
        first: the first rows of each reason, as JSON.
        splits: of every unit in order, the split it is in, or None.
        held_out: what the valid split says.
    """

    held_out: EvaluationTexts
    rows: Counter[int] = field(default_factory=Counter)
    kept: Counter[int] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    splits: list[str | None] = field(default_factory=list)
    truncated: int = 0
    leaks: list[dict[str, str]] = field(default_factory=list)
    num_leaks: int = 0

    def leave_out(self, reason: str, place: str, detail: str) -> None:
        """Count a row, and remember it if it is one of the first."""
        self.left_out[reason] += 1
        examples = self.first.setdefault(reason, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append({"row": place, "detail": detail})


def chunk_name(number: int) -> str:
    """What the documents of a chunk are kept under."""
    return f"examples-{number:06d}"


def assemble(
    staging: Staging, request: ExamplesRequest, sources: Sequence[Source], encoder: ExampleEncoder, num_chunks: int
) -> dict[str, Any]:
    """Write all of the output into the staging directory; returns its manifest.

    Raises:
        DataError: no row is left to train on.
        ResumableError: nothing can be written, or a finished chunk is damaged.
    """
    options, tokenizer = request.options, encoder.tokenizer.tokenizer
    findings = _judged(staging, options, num_chunks)
    if "train" not in findings.splits:
        said = ", ".join(f"{count} {reason}" for reason, count in findings.left_out.most_common()) or "none is there"
        raise DataError(f"No row is left to train on ({said}); the inputs have {sum(findings.rows.values())} rows.")
    directory = staging.begin_corpus()
    with writing(directory):
        _write_tokenizer(directory / "tokenizer", tokenizer, encoder.template.source)
        facts = {
            "kind": options.kind,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
            "tokenizer_hash": tokenizer.hash,
            "template_sha256": encoder.template.sha256,
            "sources": [str(source.path) for source in sources],
        }
        splits = _write_splits(staging, directory, facts, findings, options, num_chunks)
        manifest = {
            "request": request.to_dict(),
            "kind": options.kind,
            "template": {
                "name": encoder.template.name,
                "sha256": encoder.template.sha256,
                "spans": encoder.template.way,
                "end_ids": encoder.end_ids,
            },
            "tokenizer": {name: facts[name] for name in ("vocab_size", "eod_id")} | {"hash": tokenizer.hash},
            "sources": [
                {
                    "path": str(source.path),
                    "sha256": source.sha256,
                    "rows": findings.rows[place],
                    "kept": findings.kept[place],
                }
                for place, source in enumerate(sources)
            ],
            "left_out": dict(findings.left_out.most_common()),
            "left_out_first": findings.first,
            "truncated": findings.truncated,
            "leakage": {"train_rows_like_valid": findings.num_leaks, "first": findings.leaks},
            "splits": splits,
            "files": {
                str(path.relative_to(directory)): file_sha256(path)
                for path in sorted(directory.rglob("*"))
                if path.is_file() and path.suffix != ".arrow"
            },
        }
        return write_manifest(directory, manifest)


def _judged(staging: Staging, options: Options, num_chunks: int) -> Findings:
    """Which rows are kept, and where; one pass over the chunks in their order."""
    near = options.near_threshold if options.duplicates == "near" else None
    duplicates = Duplicates(QualityConfig(exact_duplicates=True, near_duplicates=near)) if options.duplicates else None
    findings = Findings(EvaluationTexts(options.leak_share))
    places: dict[int, str] = {}
    held_out: list[tuple[str, str]] = []
    for units, left_out, rows in _chunks(staging, num_chunks):
        findings.rows.update(rows)
        for one in left_out:
            findings.leave_out(one.reason, one.place, one.detail)
        for unit in units:
            found = duplicates.original(unit.number, _screened(unit)) if duplicates and not unit.leak else None
            if unit.leak:
                findings.leave_out(f"leak:{unit.leak}", unit.place, f"is asked by {unit.leak}")
            elif found:
                findings.leave_out(REASONS[found[1]], unit.place, f"repeats {places[found[0]]}")
            if unit.leak or found:
                findings.splits.append(None)
                continue
            places[unit.number] = unit.place
            valid = in_valid(options.seed, int(unit.opening, 16), options.valid_share)
            findings.splits.append("valid" if valid else "train")
            findings.kept[unit.source] += 1
            findings.truncated += unit.truncated
            if valid:
                held_out.append((unit.opening, unit.text))
    findings.held_out.add("valid", held_out)
    return findings


def _write_splits(
    staging: Staging, directory: Path, facts: dict[str, Any], findings: Findings, options: Options, num_chunks: int
) -> dict[str, Any]:
    """Write the kept units, in their order; what the manifest says of each split."""
    writers: dict[str, SplitWriter] = {}
    for name in sorted({name for name in findings.splits if name}):
        (directory / name).mkdir()
        writers[name] = SplitWriter(directory / name, facts, options.shard_tokens)
    splits = iter(findings.splits)
    rows: Counter[str] = Counter()
    for units, _, _ in _chunks(staging, num_chunks):
        for unit in units:
            if (split := next(splits)) is None:
                continue
            rows[split] += 1
            if split == "train" and "valid" in writers and findings.held_out.leak(unit.text, unit.opening):
                findings.num_leaks += 1
                if len(findings.leaks) < NUM_EXAMPLES:
                    findings.leaks.append({"row": unit.place})
            writers[split].add(
                unit.documents,
                number=unit.number,
                source=unit.source,
                margin=unit.margin,
                score=unit.score,
                fields=unit.fields,
            )
    return {name: _described(writer, rows[name], options) for name, writer in writers.items()}


def _described(writer: SplitWriter, rows: int, options: Options) -> dict[str, Any]:
    index = writer.finish()
    counts = ("num_documents", "num_tokens", "longest", "tokens_by_role", "trained_by_role", "digest")
    described = {"rows": rows, **{name: index[name] for name in counts}}
    if options.kind != "prompt":
        packing = ExampleRows(ExampleStore.open(writer.directory), options.seq_length).packing
        described["packing"] = {
            "seq_length": options.seq_length,
            "rows": packing.num_rows,
            "efficiency": round(packing.efficiency, 6),
        }
    return described


def _write_tokenizer(directory: Path, tokenizer: Tokenizer, template: str) -> None:
    tokenizer.save(directory)
    for folder in (directory, directory / COMPANIONS_FOLDER):
        # The one that was used, also where a checkpoint takes its own from.
        if folder.is_dir():
            (folder / TEMPLATE_NAME).write_text(template, encoding="utf-8")


def _chunks(staging: Staging, num_chunks: int) -> Iterator[tuple[list[Unit], list[LeftOut], list[int]]]:
    for number in range(num_chunks):
        packed = staging.load_finished(chunk_name(number))
        yield *unpack(packed), packed["rows"].tolist()


def _screened(unit: Unit) -> Screened:
    return Screened("", key=unit.key, signature=unit.signature)
