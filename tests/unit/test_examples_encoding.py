"""What the assistant made is known from the template, or the row is refused: text, spans, ids, weights, roles."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.data.examples.encoding import Encoded, ExampleEncoder
from megatron_slm.data.examples.records import BadRow, Record, record_of
from megatron_slm.data.examples.special_tokens import TemplateTokenizer
from megatron_slm.data.examples.store import ROLES
from megatron_slm.data.examples.template import BUILT_IN, ChatTemplate, open_template
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import DataError
from tests.example_files import byte_level, pieces

CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "wrap this text é 日本"},
        {"role": "assistant", "content": "No width."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": " Because."},
    ]
}
UNMARKED_CHATML = BUILT_IN["chatml"].replace("{% generation %}", "").replace("{% endgeneration %}\n", "")


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_level(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return pieces(tmp_path_factory.mktemp("sp"))


def encoder(tokenizer: Tokenizer, source: str, **options: Any) -> ExampleEncoder:
    tokens = {"eos_token": tokenizer.piece(tokenizer.eod_id)}
    return ExampleEncoder(TemplateTokenizer(tokenizer), ChatTemplate("test", source, tokens), **options)


def named(tokenizer: Tokenizer, name: str) -> ExampleEncoder:
    return ExampleEncoder(TemplateTokenizer(tokenizer), open_template(name, tokenizer))


def encoded(made: ExampleEncoder, row: Any, kind: str = "chat") -> Encoded:
    record = record_of(row, kind)
    return made.conversation(record, record.answers[0])


def trained(tokenizer: Tokenizer, document: Encoded) -> list[str]:
    """The trained runs of a document, special tokens by name."""
    parts = [""]
    for token, weight in zip(document.tokens.tolist(), document.weights.tolist(), strict=True):
        if weight:
            parts[-1] += tokenizer.piece(token)
        elif parts[-1]:
            parts.append("")
    return [part.replace("Ġ", " ").replace("\u2581", " ") for part in parts if part]


def refused(made: ExampleEncoder, row: Any, kind: str = "chat") -> BadRow:
    with pytest.raises(BadRow) as caught:
        encoded(made, row, kind)
    return caught.value


def test_marked_and_derived_spans_are_the_same(chatml: Tokenizer) -> None:
    marked, derived = encoder(chatml, BUILT_IN["chatml"]), encoder(chatml, UNMARKED_CHATML)
    assert (marked.template.way, derived.template.way) == ("marked", "derived")
    one, other = encoded(marked, CHAT), encoded(derived, CHAT)
    assert trained(chatml, one) == ["No width.<|im_end|>", " Because.<|im_end|>"]
    for name in ("tokens", "weights", "roles"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    assert chatml.piece(int(one.tokens[-1])) == "<|im_end|>", "it ends with what is trained"
    assert marked.end_ids == derived.end_ids == [2]


@pytest.mark.parametrize("name", ["plain", "raw"])
def test_every_tokenizer_can_chat(sentences: Tokenizer, chatml: Tokenizer, name: str) -> None:
    for tokenizer in (sentences, chatml):
        made, end = named(tokenizer, name), tokenizer.piece(tokenizer.eod_id)
        found = encoded(made, {"prompt": "def wrap", "completion": "ped text"})
        assert trained(tokenizer, found) == [f"ped text{end}"]
        assert made.end_ids == [tokenizer.eod_id]


def test_training_reads_what_generation_will(sentences: Tokenizer, chatml: Tokenizer) -> None:
    for tokenizer, name in ((sentences, "plain"), (sentences, "raw"), (chatml, "chatml"), (chatml, "raw")):
        made = named(tokenizer, name)
        prompt = made.prompt(record_of({"prompt": "wrap a te"}, "prompt")).tokens
        whole = encoded(made, {"prompt": "wrap a te", "completion": "xt here"})
        assert whole.first_trained == len(prompt)
        assert np.array_equal(whole.tokens[: len(prompt)], prompt)


def test_roles_and_weights(sentences: Tokenizer) -> None:
    made = encoder(sentences, BUILT_IN["plain"], rationale_weight=0.5)
    answer = {**CHAT["messages"][2], "rationale": "Reason: ", "weight": 2.0}
    row = {"messages": [*CHAT["messages"][:2], answer, *CHAT["messages"][3:]]}
    found = encoded(made, row)
    by_role = {role: found.tokens[found.roles == number].tolist() for number, role in enumerate(ROLES)}
    assert sentences.decode(by_role["user"]) == "wrap this text é 日本Why?"
    assert sentences.decode(by_role["system"]) == "Be brief."
    assert sentences.decode(by_role["rationale"]).strip() == "Reason:"
    assert sentences.decode(by_role["template"]) == "System:\n\nUser:\n\nAssistant:\n\nUser:\n\nAssistant:\n"
    assert set(found.weights[found.roles == ROLES.index("rationale")].tolist()) == {1.0}
    assert set(found.weights[found.roles == ROLES.index("assistant")].tolist()) == {2.0, 1.0}
    assert not found.weights[np.isin(found.roles, [ROLES.index(role) for role in ("user", "system", "template")])].any()
    assert encoded(made, {**row, "rationale_weight": 0.0}).weights[found.roles == ROLES.index("rationale")].max() == 0.0


def test_a_template_that_cannot_be_cut_is_refused_and_not_guessed(chatml: Tokenizer, sentences: Tokenizer) -> None:
    forgets = UNMARKED_CHATML.replace("message['content'] +", "(message['content'] if loop.last else 'x') +")
    assert refused(encoder(chatml, forgets), CHAT).reason == "template not derivable"
    no_question = UNMARKED_CHATML.replace("<|im_start|>assistant\\n' }}{% endif", "<|im_start|>robot\\n' }}{% endif")
    assert refused(encoder(chatml, no_question), CHAT).reason == "template not derivable"
    endless = BUILT_IN["plain"].replace(" + eos_token", "")
    assert refused(encoder(chatml, endless), CHAT).reason == "no end of turn"
    half_marked = BUILT_IN["chatml"].replace("message['role'] == 'assistant'", "loop.last")
    assert refused(encoder(chatml, half_marked), CHAT).reason == "generation marks"
    inside = BUILT_IN["plain"].replace("message['role'] | capitalize + ':\\n'", "'te'")
    assert refused(encoder(chatml, inside), {"prompt": "wrap ", "completion": "xt"}).reason == "cut inside a token"
    assert refused(encoder(sentences, "{{ raise_exception('no') }}"), CHAT).reason == "refused by the template"


def test_special_tokens_in_what_people_say_are_refused(chatml: Tokenizer) -> None:
    error = refused(named(chatml, "chatml"), {"prompt": "end <|im_end|> early", "completion": "x"})
    assert error.reason == "special token" and "<|im_end|>" in error.detail
    assert refused(named(chatml, "raw"), CHAT).reason == "chat without template"


def test_nothing_trained(chatml: Tokenizer) -> None:
    messages = [CHAT["messages"][1], {**CHAT["messages"][2], "weight": 0}]
    assert refused(named(chatml, "chatml"), {"messages": messages}).reason == "nothing trained"


def test_chatml_needs_its_tokens_and_a_template_must_be_one(sentences: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--template plain"):
        named(sentences, "chatml")
    with pytest.raises(DataError, match="--template"):
        open_template(None, sentences)
    with pytest.raises(DataError, match="absent"):
        open_template(tmp_path / "absent", sentences)
    (tmp_path / "bad.jinja").write_text("{% for %}")
    with pytest.raises(DataError, match="line 1"):
        open_template(tmp_path / "bad.jinja", sentences)


def test_the_tokenizers_own_template_is_found(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"chat_template": [{"name": "default", "template": "own {{ eos_token }}"}], "eos_token": "E"}')
    assert open_template(None, tokenizer).render([]) == "own E"
    (tmp_path / "chat_template.jinja").write_text("nearer")
    assert open_template(None, tokenizer).source == "nearer"


def test_a_template_is_sandboxed(sentences: Tokenizer) -> None:
    reaches = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    assert refused(encoder(sentences, reaches), CHAT).reason == "refused by the template"


def test_an_encoder_goes_to_another_process(chatml: Tokenizer) -> None:
    made = named(chatml, "chatml")
    record: Record = record_of(CHAT, "chat")
    again = pickle.loads(pickle.dumps(made)).conversation(record, record.answers[0])
    assert np.array_equal(again.tokens, encoded(made, CHAT).tokens)


WITH_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are helpful<|im_end|>\\n' }}{% endif %}"
)
"""As many published templates begin."""


@pytest.mark.parametrize("source", [BUILT_IN["chatml"], BUILT_IN["plain"], WITH_SYSTEM + BUILT_IN["chatml"]])
def test_text_ids_and_mask_are_those_of_transformers(chatml: Tokenizer, source: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(chatml.path), eos_token="<|endoftext|>")
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    expected = theirs.apply_chat_template(CHAT["messages"], chat_template=source, **options)
    ours = encoded(encoder(chatml, source), CHAT)
    length = len(ours.tokens)
    assert ours.tokens.tolist() == expected["input_ids"][:length]
    assert (ours.weights != 0).tolist() == [bool(one) for one in expected["assistant_masks"][:length]]
    assert not any(expected["assistant_masks"][length:]), "what is cut off is not trained"
    derived = encoded(
        encoder(chatml, source.replace("{% generation %}", "").replace("{% endgeneration %}\n", "")), CHAT
    )
    assert derived.tokens.tolist() == ours.tokens.tolist() and derived.weights.tolist() == ours.weights.tolist()
    asked = theirs.apply_chat_template(CHAT["messages"][:2], chat_template=source, add_generation_prompt=True)
    prompt = encoder(chatml, source).prompt(record_of({"prompt": CHAT["messages"][:2]}, "prompt"))
    assert prompt.tokens.tolist() == (asked if isinstance(asked, list) else asked["input_ids"])
