"""``card.md``: what a corpus holds, where it is from and what was done to it, in sentences and tables for a person."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

CARD_NAME = "card.md"

FLAGS = {
    "split": "--split",
    "seed": "--seed",
    "text_key": "--text-key",
    "text_unit": "--text-unit",
    "vocab_size": "--vocab-size",
    "tokenizer_type": "--tokenizer-type",
    "eod_token": "--eod-token",
    "licence": "--licence",
}
"""Values of the request, as ``mslm data prepare`` takes them."""

QUALITY_FLAGS = {
    "near_duplicates": "--near-threshold",
    "min_characters": "--min-chars",
    "max_characters": "--max-chars",
    "leakage_text_key": "--decontaminate-key",
}


def write(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write ``card.md`` into ``directory`` from the manifest alone; equal manifests give equal cards.

    Args:
        manifest: with ``request``, ``sources``, ``dropped``, ``scrubbed``, ``evidence``, ``tokenizer`` and ``splits``,
            as :func:`megatron_slm.data.preparation.publishing.assemble` makes it.
    """
    (directory / CARD_NAME).write_text(render(manifest), encoding="utf-8")


def render(manifest: Mapping[str, Any]) -> str:
    """The card, in Markdown."""
    sections = {
        "Content": _content(manifest),
        "Sources": _sources(manifest["sources"]),
        "Removed documents": _removed(manifest),
        "Personal data": _personal(manifest),
        "Overlap with evaluation files": _leakage(manifest),
        "Tokenizer": _tokenizer(manifest),
        "To make it again": _again(manifest),
    }
    parts = ["# Data card", *("\n".join([f"## {title}", "", *lines]) for title, lines in sections.items())]
    return "\n\n".join(parts) + "\n"


def _content(manifest: Mapping[str, Any]) -> Iterator[str]:
    request = manifest["request"]
    rows = []
    for name, split in manifest["splits"].items():
        characters = f"{split['num_characters']:,}" if split["num_characters"] else "not known"
        rows.append([name, f"{split['num_documents']:,}", f"{split['num_tokens']:,}", characters, split["digest"]])
    yield from _table(["split", "documents", "tokens", "characters", "digest"], rows)
    yield ""
    if request["split"]:
        yield (
            f"A hash of each document's number puts a share of {request['split']:g} of them into `valid` (seed "
            f"{request['seed']}). Tokens include the one that ends each document."
        )
    else:
        yield "Nothing is held out. Tokens include the one that ends each document."


def _sources(sources: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield from _table(
        ["source", "kind", "files", "bytes", "documents", "kept", "licence", "sha256"],
        [
            [
                source["path"],
                source["kind"],
                f"{source['files']:,}" + (f" ({source['files_skipped']:,} not UTF-8)" * bool(source["files_skipped"])),
                f"{source['bytes']:,}",
                f"{source['documents']:,}",
                f"{source['kept']:,}",
                source["licence"] or "not stated",
                source["sha256"],
            ]
            for source in sources
        ],
    )


def _removed(manifest: Mapping[str, Any]) -> Iterator[str]:
    quality, dropped = manifest["request"]["quality"], manifest["dropped"]
    if not quality:
        yield "No filter was asked for: every document that is not empty was kept."
        return
    total = sum(source["documents"] for source in manifest["sources"])
    asked = [f"{name} = {value}" for name, value in quality.items() if name not in ("packages", "leakage_against")]
    versions = [f"{name} {version}" for name, version in quality.get("packages", {}).items()]
    yield f"Asked for: {', '.join([*asked, *versions])}." if asked else "Asked for: evaluation files, below."
    yield ""
    rows = [[reason, f"{count:,}", _share(count, total)] for reason, count in dropped.items()]
    removed = sum(dropped.values())
    rows.append(["kept", f"{total - removed:,}", _share(total - removed, total)])
    yield from _table(["reason", "documents", f"share of {total:,}"], rows)
    if duplicates := manifest["evidence"]["duplicates"]:
        yield ""
        yield "The first duplicates, documents counted from 0 over all sources: " + ", ".join(
            f"{found['document']} repeats {found['repeats']} ({found['kind']})" for found in duplicates
        )


def _personal(manifest: Mapping[str, Any]) -> Iterator[str]:
    if not (manifest["request"]["quality"] or {}).get("scrub_pii"):
        yield "Not looked for."
        return
    yield "Replaced by tags where a pattern matched; names and addresses in words are not recognised."
    yield ""
    rows = [[f"`<{name}>`", f"{count:,}"] for name, count in manifest["scrubbed"].items()]
    yield from _table(["tag", "replaced"], rows or [["none", "0"]])


def _leakage(manifest: Mapping[str, Any]) -> Iterator[str]:
    quality = manifest["request"]["quality"] or {}
    files = quality.get("leakage_against", [])
    if not files:
        yield "Not checked."
        return
    leaks = manifest["evidence"]["leaks"]
    share = quality.get("leakage_share", 0)
    yield (
        f"A document was removed when it shared {quality['leakage_ngram']} words in a row, or the whole of a shorter "
        "evaluation text, with one of these files"
        + (f", and more than {share:g} of its words lay in such runs." if share else ".")
    )
    yield ""
    rows = [[file["name"], f"{leaks.get(file['name'], {}).get('documents', 0):,}", file["sha256"]] for file in files]
    yield from _table(["evaluation file", "documents that overlap", "sha256"], rows)
    for name, found in leaks.items():
        yield ""
        yield f"The first with {name}:"
        yield ""
        for leak in found["examples"]:
            yield f"- document {leak['document']}, text {leak['eval_document']} of the file: {_plain(leak['ngram'])}"


def _tokenizer(manifest: Mapping[str, Any]) -> Iterator[str]:
    tokenizer, given = manifest["tokenizer"], manifest["request"]["tokenizer_hash"]
    kind = manifest["request"].get("tokenizer_type") or ""
    origin = "was given" if given else f"was trained ({kind}) on the kept documents of `train`"
    yield (
        f"`tokenizer/{tokenizer['file']}` ({tokenizer['kind']}, {tokenizer['vocab_size']:,} pieces) {origin}. "
        f"Its sha256 is {tokenizer['hash']}; id {tokenizer['eod_id']} ends a document."
    )


def _again(manifest: Mapping[str, Any]) -> Iterator[str]:
    yield "```"
    yield shlex.join(command(manifest))
    yield "```"
    yield ""
    yield "Files with the sha256 of this card give the same digests."


def command(manifest: Mapping[str, Any]) -> list[str]:
    """The words of the command that makes the corpus from the same files."""
    request, tokenizer = manifest["request"], manifest["tokenizer"]
    quality = request["quality"] or {}
    words = ["mslm", "data", "prepare", *(source["path"] for source in manifest["sources"]), "--output", "NEW_DIR"]
    if request["tokenizer_hash"]:
        words += ["--tokenizer-model", f"tokenizer/{tokenizer['file']}"]
    words += _flags(FLAGS, request)
    patterns = {source.get("pattern") for source in manifest["sources"]} - {None}
    words += [word for pattern in sorted(patterns) for word in ("--pattern", pattern)]
    if "near_duplicates" in quality or "exact_duplicates" in quality:
        words += ["--dedup", "near" if "near_duplicates" in quality else "exact"]
    words += _flags(QUALITY_FLAGS, quality)
    if "languages" in quality:
        words += ["--language", *quality["languages"]]
    if "scrub_pii" in quality:
        words.append("--scrub-pii")
    if "leakage_against" in quality:
        words += ["--decontaminate", *(file["name"] for file in quality["leakage_against"])]
        words += ["--ngram", str(quality["leakage_ngram"])]
    return words


def _flags(flags: Mapping[str, str], values: Mapping[str, Any]) -> list[str]:
    given = ((flag, values.get(name)) for name, flag in flags.items())
    return [word for flag, value in given if value is not None for word in (flag, str(value))]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for row in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(_plain(cell) for cell in row)} |"


def _plain(text: str) -> str:
    """On one line, and no column of its own."""
    return " ".join(text.split()).replace("|", "\\|")


def _share(count: int, total: int) -> str:
    return f"{count / total:.2%}" if total else "-"
