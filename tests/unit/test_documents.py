"""Every format gives its documents, and whatever cannot be read is one sentence that names the file."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from megatron_slm.data import documents, indexed
from megatron_slm.data.documents import Source, open_sources, read_documents, read_token_documents
from megatron_slm.errors import DataError

TEXTS = ["one\n\ntwo", "日本語 😀", "  three\r\n"]


def opened(path: Path, pattern: str = documents.DEFAULT_PATTERN) -> Source:
    (source,) = open_sources([path], pattern=pattern)
    return source


def read(path: Path, *, text_key: str = "text", text_unit: str = "paragraph", pattern: str = "**/*.py") -> list[str]:
    return list(read_documents(opened(path, pattern), text_key=text_key, text_unit=text_unit))


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def compressed(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def parquet(path: Path, columns: dict[str, pa.Array], rows: int = 2) -> Path:
    pa.parquet.write_table(pa.table(columns), path, row_group_size=rows)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_lines_and_paragraphs_also_compressed(suffix: str, tmp_path: Path) -> None:
    for name, content in (("a.jsonl", lines(["", *TEXTS])), ("a.txt", b"\n\none\n  two\n\n \t\n\nthree\n")):
        (tmp_path / f"{name}{suffix}").write_bytes(compressed(content, suffix) if suffix else content)
    assert read(tmp_path / f"a.jsonl{suffix}") == TEXTS
    assert read(tmp_path / f"a.txt{suffix}") == ["one\n  two", "three"]
    assert read(tmp_path / f"a.txt{suffix}", text_unit="file") == ["\n\none\n  two\n\n \t\n\nthree\n"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_that_were_joined_are_read_to_the_end(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compressed(lines(TEXTS[:1]), suffix) + compressed(lines(TEXTS[1:]), suffix))
    assert read(path) == TEXTS


def test_a_source_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS))
    source = opened(path)
    assert (source.path, source.kind, source.num_bytes) == (path, "jsonl", path.stat().st_size)
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone".encode())
    (tmp_path / "a.jsonl").write_bytes("\ufeff".encode() + lines(["one"]))
    assert read(tmp_path / "a.txt") == read(tmp_path / "a.jsonl") == ["one"]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_a_column_of_strings_of_any_kind(kind: pa.DataType, tmp_path: Path) -> None:
    texts = pa.array(["", *TEXTS]).cast(kind)
    path = parquet(tmp_path / "a.parquet", {"id": pa.array(range(4)), "body": texts})
    assert read(path, text_key="body") == TEXTS


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"id": pa.array([1]), "body": pa.array(["x"])}, r'no columns "text"; its columns are id \(int64\), body'),
        ({"text": pa.array([3])}, r'"text" of .*a\.parquet holds int64, not strings; its columns are text \(int64\)'),
        ({"text": pa.array([b"x"])}, r"holds binary, not strings"),
        ({"text": pa.array([["x"]])}, r"not strings"),
        ({"text": pa.array(["x", "y", "z", None])}, r'no text in row 3 of the column "text"'),
    ],
)
def test_columns_without_text_are_refused(columns: dict[str, pa.Array], reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=reason):
        read(parquet(tmp_path / "a.parquet", columns))


def test_parquet_is_read_by_row_groups(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"text": pa.array([str(number) for number in range(1000)])}, rows=10)
    texts = read_documents(opened(path), text_key="text", text_unit="file")
    assert next(texts) == "0"
    # Only what is asked for is read: the damage lies in a later row group.
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert next(texts) == "1"
    with pytest.raises(DataError, match=r"a\.parquet changed while it was read"):
        list(texts)


def tree(root: Path) -> Path:
    for name, content in (
        ("b.py", b"# SPDX-License-Identifier: MIT\nb = 1\n\n\nc = 2\n"),
        ("a/z.py", b"z = 1\r\n"),
        ("a.py", b"a = 1\n"),
        ("a/__init__.py", b""),
        ("a/latin.py", b"# caf\xe9\n"),
        ("a/notes.txt", b"no source\n"),
        (".venv/x.py", b"hidden = 1\n"),
        ("site-packages/x.py", b"installed = 1\n"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "loop").symlink_to(root)
    (root / "dangling.py").symlink_to(root / "absent.py")
    return root


def test_a_directory_is_a_source_tree(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree")
    source = opened(root)
    names = [file.path.relative_to(root).as_posix() for file in source.files]
    assert (source.kind, names) == ("tree", ["a/__init__.py", "a/z.py", "a.py", "b.py"])
    assert (source.num_skipped, source.num_bytes) == (1, sum(file.num_bytes for file in source.files))
    assert read(root) == ["z = 1\n", "a = 1\n", "# SPDX-License-Identifier: MIT\nb = 1\n\n\nc = 2\n"]
    assert read(root, pattern="*/*.txt") == ["no source\n"]
    # The same files elsewhere are the same source, another name is another one.
    assert opened(tree(tmp_path / "copy")).sha256 == source.sha256
    (root / "b.py").rename(root / "d.py")
    assert opened(root).sha256 != source.sha256


def test_a_corpus_inside_a_tree_is_no_source_text(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree")
    (root / "x.json").write_text("{}")
    before = opened(root, "**/*.json").sha256
    for name in (
        "corpus/manifest.json",
        "corpus/train/index.json",
        "a/corpus/manifest.json",
        "a/corpus/train/index.json",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    assert opened(root, "**/*.json").sha256 == before
    assert len(opened(root / "corpus", "**/*.json").files) == 2, "one that is named itself is read"


@pytest.mark.parametrize("name", ["a.JSONL", "a.Jsonl.GZ"])
def test_the_case_of_an_ending_does_not_matter(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(compressed(lines(TEXTS), ".gz") if name.endswith("GZ") else lines(TEXTS))
    assert read(tmp_path / name) == TEXTS


@pytest.mark.parametrize("pattern", ["**/*.rs", "/etc/*", "", "a/__init__.py"])
def test_a_pattern_without_text_is_refused(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--pattern"):
        opened(tree(tmp_path / "tree"), pattern)


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "x.txt.gz", "x.zst"])
def test_formats_are_not_read_as_source_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=f"{name} matches the pattern .* themselves, or change --pattern"):
        opened(tmp_path, "**/*")


def test_part_of_the_standard_library_is_a_tree() -> None:
    root = Path(sysconfig.get_paths()["stdlib"], "json")
    source = opened(root)
    assert len(source.files) == len(list(root.glob("**/*.py"))) > 3
    assert any("class JSONDecoder" in text for text in read(root))


def test_token_files_are_recognised_and_give_ids(tmp_path: Path) -> None:
    with indexed.IndexedWriter(tmp_path / "text_document", np.dtype(np.uint16)) as writer:
        for document in ([5, 6, 0], [0], [], [7]):
            writer.add_document(document)
    sources = open_sources([tmp_path / name for name in ("text_document", "text_document.bin", "text_document.idx")])
    assert {source.sha256 for source in sources} == {sources[0].sha256} and sources[0].kind == "tokens"
    assert [ids.tolist() for ids in read_token_documents(sources[0], eod_id=0)] == [[5, 6], [7]]
    with pytest.raises(DataError, match="holds token ids, not text. Give the tokenizer"):
        list(read_documents(sources[0], text_key="text", text_unit="file"))
    with (tmp_path / "text_document.bin").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(DataError, match=r"text_document\.bin changed while it was read"):
        list(read_token_documents(sources[0], eod_id=0))


@pytest.mark.parametrize(
    ("head", "licence"),
    [
        ("# SPDX-License-Identifier: Apache-2.0\nx = 1\n", "Apache-2.0"),
        ("#!/bin/sh\n// SPDX-License-Identifier: MIT OR Apache-2.0\r\nx\n", "MIT OR Apache-2.0"),
        (
            "/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) */\n",
            "(GPL-2.0-only WITH Linux-syscall-note)",
        ),
        ("<!-- SPDX-License-Identifier: CC0-1.0 -->\n", "CC0-1.0"),
        ("text about SPDX-License-Identifier: MIT\n", None),
        ("name = 'SPDX-License-Identifier: ' + name\n", None),
        ("x" * 5000 + "\n# SPDX-License-Identifier: MIT\n", None),
        ("x\n", None),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_licence_stands_at_the_head_of_a_text(head: str, licence: str | None, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compressed(head.encode(), suffix) if suffix else head.encode())
    assert opened(path).licence == licence
    # In a file of many documents a line is text of one of them.
    (tmp_path / "a.jsonl").write_bytes(lines([head]))
    assert opened(tmp_path / "a.jsonl").licence is None


def test_a_tree_has_the_licences_of_all_its_files_or_none(tmp_path: Path) -> None:
    for name, licence in (("a", "MIT OR Apache-2.0"), ("b", "BSD-3-Clause"), ("c", "BSD-3-Clause")):
        (tmp_path / f"{name}.py").write_text(f"# SPDX-License-Identifier: {licence}\n")
    (tmp_path / "__init__.py").touch()
    assert opened(tmp_path).licence == "(MIT OR Apache-2.0) AND BSD-3-Clause"
    (tmp_path / "d.py").write_text("d = 1\n")
    assert opened(tmp_path).licence is None


def broken(suffix: str) -> bytes:
    return compressed(lines(TEXTS * 100), suffix)[:-20]


BAD: dict[str, tuple[str, bytes, str]] = {
    "truncated gzip": ("a.jsonl.gz", broken(".gz"), r"a\.jsonl\.gz is truncated or damaged: Truncated"),
    "truncated zstd": ("a.txt.zst", broken(".zst"), r"a\.txt\.zst is truncated or damaged: Truncated"),
    "no gzip": ("a.txt.gz", b"plain text", r"a\.txt\.gz is truncated or damaged"),
    "garbage after gzip": ("a.jsonl.gz", compressed(lines(TEXTS), ".gz") + b"garbage", "is truncated or damaged"),
    "0 bytes": ("a.jsonl", b"", r"a\.jsonl is empty \(0 bytes\)"),
    "0 bytes compressed": ("a.jsonl.gz", b"", r"a\.jsonl\.gz is empty \(0 bytes\)"),
    "0 bytes of tokens": ("a.idx", b"", r"Cannot read .*a\.bin: No such file"),
    "no parquet": ("a.parquet", b"plain text", r"a\.parquet is damaged or no \.parquet file"),
    "not UTF-8": ("a.txt", b"caf\xe9\n", r"a\.txt is not UTF-8"),
    "not UTF-8 in a line": ("a.jsonl", b'{"text": "caf\xe9"}\n', r"a\.jsonl is not UTF-8"),
    "not JSON": ("a.jsonl", b'{"text": "fine"}\n{"text": \n', r"a\.jsonl:2 is not JSON"),
    "huge number": ("a.jsonl", b'{"text": "x", "id": ' + b"1" * 5000 + b"}\n", r"a\.jsonl:1 is not JSON"),
    "deep": ("a.jsonl", b"[" * 100_000 + b"\n", r"a\.jsonl:1 is nested too deeply"),
    "no string": ("a.jsonl", b'{"text": 3}\n', r'a\.jsonl:1 has no string under "text"'),
    "half a pair": ("a.jsonl", b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
    "another kind": ("a.csv", b"x", r"a\.csv: the name must end in \.jsonl, \.txt"),
    "compressed parquet": ("a.parquet.gz", b"x", r"the name must end in"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_one_sentence(case: str, tmp_path: Path) -> None:
    name, content, reason = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason) as refused:
        read(tmp_path / name)
    assert name.split(".")[0] in str(refused.value) and "\n" not in str(refused.value)


def test_a_cut_parquet_file_and_a_flipped_bit_are_refused(tmp_path: Path) -> None:
    texts = pa.array([f"{number} {number**3}" for number in range(20_000)])
    path = tmp_path / "a.parquet"
    # Without compression only the checksum of the page sees the bit.
    table = pa.table({"text": texts})
    pa.parquet.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = path.read_bytes()
    place = content.index(b" 1000000000")
    for damaged in (content[:-100], content[:place] + b"7" + content[place + 1 :]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.parquet is (damaged|truncated)"):
            read(path)


def test_a_file_that_is_not_there_or_may_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.txt: No such file or directory\. Check the path"):
        opened(tmp_path / "absent.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    with pytest.raises(DataError, match=r"loop\.txt: Too many levels of symbolic links"):
        opened(tmp_path / "loop.txt")


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(lines(["more"]))


def replace(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"word", b"work"))


def replace_secretly(path: Path) -> None:
    stat = path.stat()
    replace(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def cut(path: Path) -> None:
    os.truncate(path, 150_000)


def rewrite_at_once(path: Path) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(path.read_bytes())
    new.rename(path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "grown": grow,
    "cut": cut,
    "replaced": replace,
    "replaced, its time set back": replace_secretly,
    "written again": rewrite_at_once,
    "removed": Path.unlink,
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("when", ["before", "while"])
def test_a_file_that_changes_while_it_is_read_is_refused(case: str, when: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(["word " * 20] * 3000))
    texts = read_documents(opened(path), text_key="text", text_unit="file")
    if when == "while":
        next(texts)
    CHANGES[case](path)
    expected = "Cannot read .*No such file" if case == "removed" else r"a\.jsonl changed while it was read"
    with pytest.raises(DataError, match=expected):
        list(texts)


def test_a_file_of_a_tree_that_changes_is_named(tmp_path: Path) -> None:
    source = opened(tree(tmp_path / "tree"))
    (tmp_path / "tree" / "b.py").write_text("b = 2\n")
    with pytest.raises(DataError, match=r"b\.py changed while it was read"):
        list(read_documents(source, text_key="text", text_unit="file"))
