"""Duplicates, near-duplicates and evaluation texts in the King James Bible: how many are found, and how fast.

    python tests/bench/dedup.py [--quick]

The text comes from PyPI by ``examples/kjv/fetch_text.py``. Of its 31,103 verses 30,834 are different, so 269 repeat an
earlier one. For near-duplicates, each chapter is planted a second time with words replaced; the exact Jaccard index of
a pair is computed from the two sets of word 5-grams. For leaks, passages of Python's own documentation are an
evaluation file and stand, in other case and punctuation, inside chapters; beside them are near misses that share only
12 words. The last line is JSON.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data import topics

from megatron_slm.data.quality.config import QualityConfig
from megatron_slm.data.quality.duplicates import Duplicates
from megatron_slm.data.quality.screen import Screen, Screened
from megatron_slm.data.quality.signature import SHINGLE_WORDS
from megatron_slm.data.quality.words import ngrams, words

FETCH = Path(__file__).resolve().parents[2] / "examples" / "kjv" / "fetch_text.py"
THRESHOLD = 0.8
EDITED_SHARES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
"""Of the words of a planted copy; every one undoes up to five shingles."""

PASSAGE_WORDS, NEAR_MISS_WORDS = 20, 12


def main() -> None:
    """Print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer chapters and leaks, within a minute")
    quick: bool = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as directory:
        verses, chapters = fetch(Path(directory), "--verses"), fetch(Path(directory))
        if quick:
            chapters = chapters[::4]
        exact = exact_duplicates(verses)
        near = near_duplicates(chapters)
        leaks = planted_leaks(Path(directory), chapters, 50 if quick else 200)
    print(json.dumps({**exact, **near, **leaks}))


def fetch(directory: Path, *options: str) -> list[str]:
    """The documents that the recipe's program writes."""
    output = directory / f"text{''.join(options)}.jsonl"
    subprocess.run([sys.executable, str(FETCH), *options, str(output)], check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line)["text"] for line in output.read_text().splitlines()]


def exact_duplicates(verses: list[str]) -> dict[str, float]:
    """By hash, over all verses."""
    screen, duplicates = Screen(config := QualityConfig(exact_duplicates=True)), Duplicates(config)
    found = [duplicates.original(number, screen(verse)) for number, verse in enumerate(verses)]
    for number, original in enumerate(found):
        assert original is None or verses[original[0]] == verses[number], f"verse {number} is not like {original}"
    count = sum(original is not None for original in found)
    print(f"{len(verses):,} verses, {len(set(verses)):,} different: {count} exact duplicates found")
    return {"exact_duplicates_found": count}


def near_duplicates(chapters: list[str]) -> dict[str, float]:
    """Each chapter, then its copy with a share of the words replaced."""
    state = random.Random(1)
    copies = [edited(text, EDITED_SHARES[place % len(EDITED_SHARES)], state) for place, text in enumerate(chapters)]
    texts = [*chapters, *copies]
    config = QualityConfig(near_duplicates=THRESHOLD)
    screen, duplicates = Screen(config), Duplicates(config)
    started = time.perf_counter()
    screened = [screen(text) for text in texts]
    signed = time.perf_counter()
    found = [duplicates.original(number, one) for number, one in enumerate(screened)]
    searched = time.perf_counter()
    sets = [set(ngrams(words(text), SHINGLE_WORDS)) for text in texts]
    pairs = {number: original[0] for number, original in enumerate(found) if original}
    right = sum(jaccard(sets[number], sets[original]) >= THRESHOLD for number, original in pairs.items())
    print(f"\nplanted copies of {len(chapters):,} chapters, threshold {THRESHOLD}")
    print(f"{'Jaccard':<16}{'planted':>10}{'found':>10}")
    planted = {place + len(chapters): jaccard(sets[place], sets[place + len(chapters)]) for place in range(len(copies))}
    for low, high in ((0.9, 1.01), (0.85, 0.9), (THRESHOLD, 0.85), (0.75, THRESHOLD), (0.7, 0.75), (0.0, 0.7)):
        inside = [number for number, similarity in planted.items() if low <= similarity < high]
        print(f"{low:.2f} to {min(high, 1):.2f}{'':<4}{len(inside):>10}{sum(number in pairs for number in inside):>10}")
    wanted = [number for number, similarity in planted.items() if similarity >= THRESHOLD]
    recalled = sum(number in pairs for number in wanted)
    characters = sum(map(len, texts))
    print(
        f"recall at {THRESHOLD}: {recalled / len(wanted):.3f}; of {len(pairs)} pairs, {right} are at or above it by "
        f"the exact index\none process signs {characters / (signed - started) / 1e6:.1f} M characters/s and searches "
        f"{len(texts) / (searched - signed):,.0f} documents/s"
    )
    return {
        "near_pairs_planted": len(wanted),
        "near_pairs_found": recalled,
        "near_recall": round(recalled / len(wanted), 4),
        "near_precision": round(right / len(pairs), 4),
    }


def planted_leaks(directory: Path, chapters: list[str], count: int) -> dict[str, float]:
    """Passages of an evaluation file inside chapters, and near misses inside others."""
    state = random.Random(2)
    source = words(inspect.cleandoc("\n".join(topics.topics.values())))
    starts = state.sample(range(0, len(source) - PASSAGE_WORDS, PASSAGE_WORDS), count)
    passages = [source[start : start + PASSAGE_WORDS] for start in starts]
    file = directory / "eval.jsonl"
    file.write_text("".join(json.dumps({"text": " ".join(passage)}) + "\n" for passage in passages))
    screen = Screen(QualityConfig(leakage_against=(str(file),)))
    hosts = state.sample(chapters, min(count, len(chapters)))
    whole = [screen(planted(host, dressed(passage), state)) for host, passage in zip(hosts, passages, strict=False)]
    missed = [
        screen(planted(host, " ".join(["lo", *passage[:NEAR_MISS_WORDS], "lo"]), state))
        for host, passage in zip(hosts, passages, strict=False)
    ]
    started = time.perf_counter()
    clean = [screen(chapter) for chapter in chapters]
    seconds = time.perf_counter() - started
    found = sum(leaks(one) for one in whole)
    wrong = sum(leaks(one) for one in (*missed, *clean))
    print(f"\n{found} of {len(whole)} planted passages of {PASSAGE_WORDS} words found")
    print(f"{wrong} of {len(missed)} near misses and {len(clean):,} chapters without a passage taken for a leak")
    print(f"one process checks {sum(map(len, chapters)) / seconds / 1e6:.1f} M characters/s")
    return {"planted_leaks_found_share": found / len(whole), "false_leaks": wrong}


def edited(text: str, share: float, state: random.Random) -> str:
    """``text`` with at least one word, and this share of them, replaced by words that occur nowhere else."""
    changed = text.split(" ")
    for place in state.sample(range(len(changed)), max(1, round(share * len(changed)))):
        changed[place] = f"word{state.randrange(10**9)}"
    return " ".join(changed)


def jaccard(first: set[str], second: set[str]) -> float:
    return len(first & second) / max(1, len(first | second))


def planted(host: str, passage: str, state: random.Random) -> str:
    lines = host.split("\n")
    lines.insert(state.randrange(len(lines)), passage)
    return "\n".join(lines)


def dressed(passage: list[str]) -> str:
    """The same words in upper case with punctuation between them."""
    return ", ".join(passage).upper() + "!"


def leaks(screened: Screened) -> bool:
    return screened.reason == "leak:eval.jsonl"


if __name__ == "__main__":
    main()
