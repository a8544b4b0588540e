"""One document: which filter drops it, what is kept of it, and what the filters are called in a request."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.data.quality.config import QualityConfig
from megatron_slm.data.quality.screen import Screen, Screened
from megatron_slm.errors import DataError

ENGLISH = "The ship left the harbour in the morning, and nobody on the shore knew where she was bound."
FRENCH = "Le navire quitta le port au matin, et personne sur le rivage ne savait quelle était sa destination."
GERMAN = "Das Schiff verließ am Morgen den Hafen, und niemand am Ufer wusste, wohin es unterwegs war."


def test_without_filters_everything_is_kept_as_it_is() -> None:
    assert Screen(QualityConfig())("a@b.org") == Screened("a@b.org")


@pytest.mark.parametrize(("size", "reason"), [(9, "short"), (10, None), (20, None), (21, "long")])
def test_length_in_characters(size: int, reason: str | None) -> None:
    assert Screen(QualityConfig(min_characters=10, max_characters=20))("é" * size).reason == reason


def test_languages() -> None:
    screen = Screen(QualityConfig(languages=("en", "de")))
    assert [screen(text).reason for text in (ENGLISH, GERMAN, FRENCH)] == [None, None, "language:fr"]
    assert screen("Bon soir !").reason is None, "too short to tell"
    assert screen("1 + 1 = 2; " * 20).reason is None, "no letters to tell by"


def test_personal_data_goes_before_texts_are_compared() -> None:
    screen = Screen(QualityConfig(exact_duplicates=True, scrub_pii=True))
    one, other = screen("write to a@b.org"), screen("write to c@d.org")
    assert one.text == "write to <EMAIL>" and one.scrubbed == {"EMAIL": 1}
    assert one.key == other.key is not None


def test_a_dropped_document_is_not_looked_at_further() -> None:
    config = QualityConfig(min_characters=100, scrub_pii=True, exact_duplicates=True, near_duplicates=0.8)
    assert Screen(config)("a@b.org") == Screened("a@b.org", "short")


def test_the_screen_judges_alike_in_another_process(tmp_path: Path) -> None:
    (tmp_path / "eval.txt").write_text(FRENCH)
    config = QualityConfig(
        near_duplicates=0.8, languages=("en", "fr"), scrub_pii=True, leakage_against=(str(tmp_path / "eval.txt"),)
    )
    screen = Screen(config)
    here = screen(ENGLISH + " a@b.org")
    program = "import pickle, sys; screen, texts = pickle.load(sys.stdin.buffer); "
    program += "sys.stdout.buffer.write(pickle.dumps([screen(text) for text in texts]))"
    task = pickle.dumps((screen, [ENGLISH + " a@b.org", FRENCH, GERMAN]))
    done = subprocess.run([sys.executable, "-c", program], input=task, capture_output=True, check=True)
    there, leak, german = pickle.loads(done.stdout)
    assert (there.text, there.key, there.scrubbed) == (here.text, here.key, here.scrubbed)
    assert np.array_equal(there.signature, here.signature)
    assert leak.reason == "leak:eval.txt" and german.reason == "language:de"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"near_duplicates": 0.0}, r"--near-threshold is 0.0, but a Jaccard similarity lies in \(0, 1\]"),
        ({"near_duplicates": 1.1}, "--near-threshold is 1.1"),
        ({"min_characters": -1}, "--min-chars is -1, but .*; 0 drops"),
        ({"max_characters": 0}, "--max-chars is 0 and --min-chars 0"),
        ({"min_characters": 5, "max_characters": 4}, "--max-chars is 4 and --min-chars 5: no document"),
        ({"leakage_ngram": 0}, "--ngram is 0"),
        ({"leakage_share": 1.0}, "leakage_share is 1.0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        QualityConfig(**options)


def test_an_unknown_language_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="does not know xx, english; it knows the ISO codes .* en .* fr "):
        Screen(QualityConfig(languages=("en", "xx", "english")))
    with pytest.raises(DataError, match="--language is en,de, but codes are separated by spaces: --language en de"):
        Screen(QualityConfig(languages=("en,de",)))


@pytest.mark.parametrize(
    ("package", "options"), [("datasketch", {"near_duplicates": 0.8}), ("py3langid", {"languages": ("en",)})]
)
def test_a_missing_package_is_said_with_the_remedy(
    package: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(DataError, match=rf"needs the package {package}, .* pip install megatron-slm\[data\]"):
        QualityConfig(**options)
    QualityConfig(exact_duplicates=True, scrub_pii=True)


def test_what_decides_the_outcome_is_described(tmp_path: Path) -> None:
    assert QualityConfig().described() == {}
    path = tmp_path / "eval.txt"
    path.write_text(ENGLISH)
    config = QualityConfig(languages=("fr", "en"), near_duplicates=0.8, leakage_against=(str(path),))
    described = config.described()
    assert json.loads(json.dumps(described)) == described
    assert described["languages"] == ["en", "fr"] and described["leakage_ngram"] == 13
    sha256 = hashlib.sha256(ENGLISH.encode()).hexdigest()
    assert described["leakage_against"] == [{"name": "eval.txt", "sha256": sha256}]
    assert set(described["packages"]) == {"datasketch", "py3langid"}
    assert "min_characters" not in described
    path.write_text(FRENCH)
    assert config.described() != described
    path.unlink()
    with pytest.raises(DataError, match=r"Cannot read the evaluation file .*eval\.txt: No such file"):
        config.described()
