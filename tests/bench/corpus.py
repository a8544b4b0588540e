"""A corpus for benchmarks that every machine has: the text of Python's own standard library."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path


def prepare_corpus(directory: Path, vocab_size: int, max_characters: int = 3_000_000) -> Path:
    """Prepared corpus of up to ``max_characters`` of standard-library source under ``directory``."""
    from megatron_slm.data.prepare import prepare

    text, total = directory / "stdlib.jsonl", 0
    with text.open("w") as stream:
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            source = path.read_text(errors="replace")
            if total + len(source) > max_characters:
                break
            total += len(source)
            stream.write(json.dumps({"text": source}) + "\n")
    prepare([text], directory / "corpus", vocab_size=vocab_size)
    return directory / "corpus"
