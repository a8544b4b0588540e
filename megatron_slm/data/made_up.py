"""Text that nobody wrote, for runs whose own corpora are on another machine: learnable, the same for the same seed."""

from __future__ import annotations

import contextlib
import io
import random
from pathlib import Path

from megatron_slm.data.prepare import TOKENIZER_PATH, prepare

_SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "wo", "zu")
_WORDS, _SUCCESSORS = 300, 4
_DOCUMENTS, _SENTENCES = 240, 8
_VALID_SHARE = 0.1


def made_up_text(seed: int) -> str:
    """Documents (paragraphs) of sentences in which every word has a few possible successors.

    The words are the same for every seed; what follows what is not, so that sources differ as languages do.
    """
    draw = random.Random(0)
    words = sorted({"".join(draw.choices(_SYLLABLES, k=draw.randint(1, 3))) for _ in range(_WORDS)})
    draw = random.Random(seed)
    successors = {word: draw.choices(words, k=_SUCCESSORS) for word in words}
    documents = []
    for _ in range(_DOCUMENTS):
        sentences, word = [], draw.choice(words)
        for _ in range(_SENTENCES):
            sentence = []
            for _ in range(draw.randint(4, 12)):
                sentence.append(word)
                word = draw.choice(successors[word])
            sentences.append(" ".join(sentence) + ".")
        documents.append(" ".join(sentences))
    return "\n\n".join(documents)


def prepare_made_up(output: Path, *, vocab_size: int, seed: int, tokenizer_model: Path | None = None) -> Path:
    """Prepare made-up text as ``mslm data prepare`` would, quietly; an equal corpus that is there already stays.

    Args:
        output: directory of the corpus; the text lies beside it.
        tokenizer_model: tokenizer of another made-up corpus, where two belong to one mixture.

    Returns:
        The corpus's tokenizer.

    Raises:
        DataError: ``output`` holds something else, or cannot be written.
    """
    text = output.with_suffix(".txt")
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text(made_up_text(seed), encoding="utf-8")
    with contextlib.redirect_stderr(io.StringIO()):  # its report of rates is about nobody's data
        prepare(
            [text],
            output,
            vocab_size=None if tokenizer_model else vocab_size,
            tokenizer_model=tokenizer_model,
            split=_VALID_SHARE,
            licence="made up",
        )
    return output / TOKENIZER_PATH
