"""Verifiers: plain functions that say how good an answer is, by name. No torch.

A verifier takes the text of an answer and the fields of its prompt's row, and returns a number; most give 1 where the
answer is right and 0 where it is not. Where the row lacks what it needs it raises :class:`Unverifiable`: then the
answer has no number, which is something else than a wrong answer.
"""

from __future__ import annotations

import ast
import json
import operator
import re
import string
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

from megatron_slm.evaluate.sandbox import Limits, run_tests

Fields = Mapping[str, Any]
Verifier = Callable[[str, Fields], float]

MAX_BITS = 4096
"""Integers inside an expression: beyond, 9**9**9 would fill the memory."""

NUMBER = re.compile(r"(?<![\w.)])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,4})?(?:/\d+)?|(?<!\d)-?\.\d+")
FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:\n?```|\Z)", re.DOTALL)


class Unverifiable(Exception):
    """The row does not hold what the verifier needs; the message says what."""


def verifiers() -> dict[str, Verifier]:
    """Every verifier that has a name."""
    return {
        "arithmetic": arithmetic,
        "exact_match": exact_match,
        "regex": regex,
        "format": required_format,
        "json_valid": json_valid,
        "unit_tests": unit_tests,
    }


def arithmetic(answer: str, fields: Fields) -> float:
    """1 where the last number of the answer is the wanted one.

    That is ``answer``, a number or the last one of a text, or the value of ``expression``. Integers must be equal;
    other numbers may differ by ``tolerance`` (default: a millionth of the wanted one).
    """
    found = last_number(answer)
    wanted = value_of(_field(fields, "expression", str)) if "expression" in fields else _wanted_number(fields)
    if found is None:
        return 0.0
    exact = wanted.denominator == 1 and "tolerance" not in fields
    tolerance = Fraction(0) if exact else Fraction(str(fields.get("tolerance", abs(float(wanted)) * 1e-6)))
    return float(abs(found - wanted) <= tolerance)


def last_number(text: str) -> Fraction | None:
    """The last number in a text: 12, -1.5, 1,234, 2e-3 or 3/4; None where there is none."""
    found = None
    for match in NUMBER.finditer(text[-10_000:]):
        found = match.group()
    if found is None:
        return None
    number, _, divisor = found.replace(",", "").partition("/")
    try:
        # By way of Decimal, which reads digits of any number.
        value = Fraction(Decimal(number))
        return value / int(Decimal(divisor)) if divisor else value
    except (InvalidOperation, ZeroDivisionError):
        return None


def value_of(expression: str) -> Fraction:
    """The value of a sum, difference, product, quotient (/, //, %) or power of numbers, with brackets.

    Raises:
        Unverifiable: it is anything else, or too large.
    """
    try:
        return _evaluated(ast.parse(expression[:1000].strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, ZeroDivisionError, MemoryError) as error:
        raise Unverifiable(f"{expression[:60]!r} is no expression with a value ({error})") from error


def _evaluated(node: ast.expr) -> Fraction:
    binary: dict[type, Callable[[Any, Any], Any]] = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
        ast.FloorDiv: operator.floordiv,
        ast.Mod: operator.mod,
        ast.Pow: _power,
    }
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _evaluated(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in binary:
        value = Fraction(binary[type(node.op)](_evaluated(node.left), _evaluated(node.right)))
        if _bits(value) > MAX_BITS:
            raise ValueError(f"numbers of more than {MAX_BITS} bits")
        return value
    raise ValueError(f"{ast.unparse(node)!r} is no arithmetic")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) * max(1, _bits(base)) > MAX_BITS:
        raise ValueError(f"the power {exponent} is too large, or no integer")
    return Fraction(base ** int(exponent))


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _wanted_number(fields: Fields) -> Fraction:
    wanted = last_number(str(_field(fields, "answer", str, int, float)))
    if wanted is None:
        raise Unverifiable(f'"answer" is {fields["answer"]!r}, which holds no number')
    return wanted


def exact_match(answer: str, fields: Fields) -> float:
    """1 where the answer is ``answer``, or one of them where that is a list.

    Both are normalised as ``normalise`` says, a list of "strip" (the ends; the default), "space" (runs of white space
    are one), "case", "punctuation" and "articles" (a, an, the, as in SQuAD).
    """
    wanted = _field(fields, "answer", str, int, float, list)
    options = fields.get("normalise", ["strip"])
    return float(normalised(answer, options) in {normalised(str(one), options) for one in _as_list(wanted)})


def normalised(text: str, options: Any) -> str:
    """A text as :func:`exact_match` compares it.

    Raises:
        Unverifiable: an option is not known.
    """
    steps: dict[str, Callable[[str], str]] = {
        "case": str.casefold,
        "punctuation": lambda text: text.translate(str.maketrans("", "", string.punctuation)),
        "articles": lambda text: re.sub(r"\b(?:a|an|the)\b", " ", text, flags=re.IGNORECASE),
        "space": lambda text: " ".join(text.split()),
        "strip": str.strip,
    }
    if not isinstance(options, list) or (unknown := [one for one in options if one not in steps]):
        named = options if not isinstance(options, list) else unknown[0]
        raise Unverifiable(f'"normalise" holds {named!r}; it is a list of {", ".join(steps)}')
    for name, step in steps.items():
        if name in options:
            text = step(text)
    return text


def regex(answer: str, fields: Fields) -> float:
    """1 where ``pattern`` is found; with a group in it, where the group's last match is ``answer``.

    ``full``: the whole answer must match. A dot matches line ends too.
    """
    try:
        pattern = re.compile(_field(fields, "pattern", str), re.DOTALL)
    except re.error as error:
        raise Unverifiable(f'"pattern" is no regular expression ({error})') from error
    matches = [pattern.fullmatch(answer)] if fields.get("full") else list(pattern.finditer(answer))
    found = [match for match in matches if match is not None]
    if not found or not pattern.groups or "answer" not in fields:
        return float(bool(found))
    return float((found[-1].group(1) or "").strip() == str(fields["answer"]).strip())


def required_format(answer: str, fields: Fields) -> float:
    """The share of ``sections`` that are there, in their order.

    A section that is a name stands for ``<name>text</name>`` with some text; anything else for a line that begins so
    ("## Result", "Answer:").
    """
    sections = _field(fields, "sections", list)
    if not sections:
        raise Unverifiable('"sections" is empty')
    place = found = 0
    for section in map(str, sections):
        name = re.escape(section)
        pattern = rf"<{name}>(?=\s*\S).*?</{name}>" if section.isidentifier() else rf"^[ \t]*{name}"
        match = re.compile(pattern, re.DOTALL | re.MULTILINE).search(answer, place)
        if match is not None and not re.fullmatch(rf"<{name}>\s*</{name}>", match.group()):
            place, found = match.end(), found + 1
    return found / len(sections)


def json_valid(answer: str, fields: Fields) -> float:
    """1 where the answer, or the last fenced block in it, is JSON; with ``keys`` an object that has them."""
    try:
        found = json.loads(last_block(answer), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return 0.0
    keys = fields.get("keys", [])
    if not isinstance(keys, list):
        raise Unverifiable(f'"keys" is {keys!r}, no list')
    return float(not keys or (isinstance(found, dict) and all(key in found for key in keys)))


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def unit_tests(answer: str, fields: Fields) -> float:
    """1 where the program passes the row's ``tests``: Python that raises where something is wrong, or a list of such.

    The program is the last fenced block of the answer, or all of it, after ``setup`` where the row has that. It runs in
    a sandbox (:mod:`megatron_slm.evaluate.sandbox`), at most ``time_limit_s`` (default 4) seconds.
    """
    tests = "\n".join(map(str, _as_list(_field(fields, "tests", str, list))))
    if not tests.strip():
        raise Unverifiable('"tests" is empty')
    limits = Limits(wall_s=float(fields.get("time_limit_s", Limits.wall_s)))
    return float(run_tests(f"{fields.get('setup', '')}\n{last_block(answer)}", tests, limits).passed)


def last_block(answer: str) -> str:
    """The content of the last block fenced by three backticks, or everything."""
    blocks = FENCED.findall(answer)
    return str(blocks[-1]) if blocks else answer


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _field(fields: Fields, name: str, *types: type) -> Any:
    """A field of the row.

    Raises:
        Unverifiable: it is missing or of another type.
    """
    if name not in fields:
        raise Unverifiable(f'the row has no "{name}"; it has {", ".join(sorted(map(str, fields))) or "no fields"}')
    value = fields[name]
    if not isinstance(value, types) or isinstance(value, bool):
        raise Unverifiable(f'"{name}" is {value!r:.60}, not {" or ".join(one.__name__ for one in types)}')
    return value
