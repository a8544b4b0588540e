"""Chat templates: conversations to text, and which part of the text the assistant made.

A template is Jinja2 as Hugging Face tokenizers carry it, run in jinja2's sandbox. It gets ``messages``, ``tools``,
``add_generation_prompt`` and the tokenizer's own tokens (``eos_token`` ...).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_slm.data.examples.records import BadRow, Message
from megatron_slm.data.tokenizer import COMPANIONS_FOLDER, Tokenizer
from megatron_slm.errors import DataError

if TYPE_CHECKING:
    import jinja2

TEMPLATE_NAME = "chat_template.jinja"
CONFIG_NAME = "tokenizer_config.json"

BEGIN, END, INSIDE, OUTSIDE = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
"""Around what the assistant made, and around the content of messages, while a template runs. Unicode keeps these for a
program's own use."""

BUILT_IN: Mapping[str, str] = {
    "chatml": """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}
{{ '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "plain": """\
{% for message in messages %}
{{ message['role'] | capitalize + ':\\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{% else %}{{ message['content'] }}{% endif %}
{{ '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}""",
    "raw": """\
{% for message in messages %}
{% if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{% else %}{{ message['content'] }}{% endif %}
{% endfor %}""",
}
"""Templates by name. "raw" is no chat: a prompt, its completion, the token that ends a document."""

RAW = "raw"


class Span(NamedTuple):
    """Characters ``start`` .. ``stop`` of a rendered conversation that the assistant made in message ``message``."""

    start: int
    stop: int
    message: int


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the tokens it may name.

    Attributes:
        name: for people: "chatml", or the file it was read from.
        source: Jinja2.
        tokens: of the tokenizer, by the names templates have for them.
        way: how :meth:`spans` are found: "marked" by the template, or "derived" from the beginnings of a conversation.
    """

    name: str
    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _compiled(self.source, self.name)

    @property
    def sha256(self) -> str:
        """Hash (hex) of the source."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def way(self) -> str:
        """See the class."""
        return "marked" if re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.source) else "derived"

    def render(self, messages: Sequence[Message], *, answering: bool = False, tools: Any = None) -> str:
        """The text of a conversation.

        Args:
            answering: end it where the assistant's next answer begins.

        Raises:
            BadRow: the template refuses the conversation.
        """
        return self._marked(messages, answering=answering, tools=tools).replace(BEGIN, "").replace(END, "")

    def spans(self, messages: Sequence[Message], *, tools: Any = None) -> tuple[str, list[Span]]:
        """The text of a conversation, and what of it the assistant made, message by message.

        Raises:
            BadRow: the template refuses the conversation, or does not say which part is the assistant's.
        """
        marked = self._marked(messages, answering=False, tools=tools)
        answers = [place for place, message in enumerate(messages) if message.role == "assistant"]
        if self.way == "derived":
            return marked, [self._derived(messages, place, marked, tools) for place in answers]
        pieces = re.split(f"([{BEGIN}{END}])", marked)
        marks = "".join(pieces[1::2])
        if marks != (BEGIN + END) * len(answers):
            raise BadRow(
                "generation marks",
                f"has {len(answers)} answers, but the template {self.name} marks {marks.count(BEGIN)} as generated; "
                "put {% generation %} and {% endgeneration %} once around each",
            )
        return "".join(pieces[::2]), _spans(pieces, answers)

    def contents(self, messages: Sequence[Message], text: str, *, tools: Any = None) -> list[Span]:
        """What of ``text``, the whole conversation, is the content of each message; none where that cannot be told."""
        wrapped = [replace(message, content=f"{INSIDE}{message.content}{OUTSIDE}") for message in messages]
        try:
            pieces = re.split(f"([{INSIDE}{OUTSIDE}])", self.render(wrapped, tools=tools))
        except BadRow:
            return []
        if "".join(pieces[::2]) != text or "".join(pieces[1::2]) != (INSIDE + OUTSIDE) * len(messages):
            return []
        return _spans(pieces, range(len(messages)))

    def _derived(self, messages: Sequence[Message], place: int, text: str, tools: Any) -> Span:
        """The answer ``place`` as what is added to the text that asks for it: each has to begin with the one before."""
        before = self.render(messages[:place], answering=True, tools=tools)
        after = self.render(messages[: place + 1], tools=tools)
        if not (text.startswith(after) and after.startswith(before) and len(before) < len(after)):
            raise BadRow(
                "template not derivable",
                f"is rendered so that the text before the answer in message {place} is not how the whole text begins; "
                f"mark the answers in the template {self.name} with {{% generation %}} and {{% endgeneration %}}",
            )
        return Span(len(before), len(after), place)

    def _marked(self, messages: Sequence[Message], *, answering: bool, tools: Any) -> str:
        from jinja2 import TemplateError

        for message in messages:
            if BEGIN in message.content or END in message.content:
                raise BadRow("not text", "holds U+FDD0 or U+FDD1, which are no characters; take them out")
            if self.name in BUILT_IN and "tool_calls" in message.more:
                raise BadRow("tool calls", f"calls tools, which the template {self.name} does not write; name another")
        said = [{"role": message.role, "content": message.content, **message.more} for message in messages]
        try:
            return _compiled(self.source, self.name).render(
                messages=said, tools=tools, add_generation_prompt=answering, **self.tokens
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise BadRow("refused by the template", f"is refused by the template {self.name} ({error})") from error


def _spans(pieces: Sequence[str], messages: Iterable[int]) -> list[Span]:
    """Texts and marks by turns, a pair of marks around each span."""
    bounds = list(itertools.accumulate(map(len, pieces[:-1:2])))
    return [Span(*one) for one in zip(bounds[::2], bounds[1::2], messages, strict=True)]


def open_template(asked: str | Path | None, tokenizer: Tokenizer) -> ChatTemplate:
    """A built-in template by name, one in a file, or the tokenizer's own.

    Args:
        asked: one of :data:`BUILT_IN`, a path, or None: what lies beside the tokenizer, ``chat_template.jinja`` or the
            ``chat_template`` of ``tokenizer_config.json``.

    Raises:
        DataError: there is none, or it is no Jinja2.
    """
    tokens = _tokens(tokenizer)
    if asked is None:
        found = _own_template(tokenizer)
        if found is None:
            raise DataError(
                f"No chat template lies beside {tokenizer.path}: neither {TEMPLATE_NAME} nor one in {CONFIG_NAME}. "
                f"Name one with --template: {', '.join(BUILT_IN)}, or a file."
            )
        return ChatTemplate(found[0], found[1], tokens)
    if (name := str(asked)) in BUILT_IN:
        return ChatTemplate(name, BUILT_IN[name], tokens)
    try:
        return ChatTemplate(name, Path(asked).read_text(encoding="utf-8"), tokens)
    except OSError as error:
        raise DataError(
            f"Cannot read the template {asked}: {error.strerror}. Give a file, or one of {', '.join(BUILT_IN)}."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"The template {asked} is not UTF-8 ({error.reason}). Convert it.") from error


def _own_template(tokenizer: Tokenizer) -> tuple[str, str] | None:
    for folder in _folders(tokenizer):
        for name in (TEMPLATE_NAME, CONFIG_NAME):
            if not (path := folder / name).is_file():
                continue
            text = path.read_text(encoding="utf-8")
            found = text if name == TEMPLATE_NAME else _json_object(path).get("chat_template")
            if isinstance(found, list):
                # Several, each under a name; tools and retrieval have their own.
                found = next((one["template"] for one in found if one.get("name") == "default"), None)
            if isinstance(found, str):
                return str(path), found
    return None


def _tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """What the tokenizer's configuration says of its tokens; what ends a document ends a turn where it says nothing."""
    tokens = {"bos_token": "", "eos_token": tokenizer.piece(tokenizer.eod_id)}
    for folder in reversed(_folders(tokenizer)):
        if (path := folder / CONFIG_NAME).is_file():
            for name, value in _json_object(path).items():
                value = value.get("content") if isinstance(value, dict) else value
                if name.endswith("_token") and isinstance(value, str):
                    tokens[name] = value
    return tokens


def _folders(tokenizer: Tokenizer) -> list[Path]:
    """Where what belongs to the tokenizer may lie, the nearest first."""
    return [tokenizer.path.parent, tokenizer.path.parent / COMPANIONS_FOLDER]


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}). Copy the tokenizer's directory anew.") from error
    return found if isinstance(found, dict) else {}


@functools.lru_cache(maxsize=16)
def _compiled(source: str, name: str) -> jinja2.Template:
    import jinja2

    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"The template {name}, line {error.lineno}: {error.message}. Mend it.") from error


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %} ... {% endgeneration %}``: leaves its text as it is, between two marks."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return BEGIN + caller() + END

    def refuse(message: str) -> str:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.globals["raise_exception"] = refuse
    # jinja2's own escapes <, > and & for web pages.
    environment.filters["tojson"] = to_json
    return environment
