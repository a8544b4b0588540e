"""The command line -> given values: ``a.b=c`` and Megatron's flags, in any order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_slm.config.keys import Key, all_keys, flag_table, unknown_flag, unknown_key
from megatron_slm.config.values import Given, parse
from megatron_slm.errors import ConfigError

SOURCE = "command line"

_ASSIGNMENT = re.compile(r"([A-Za-z_][\w.]*)=(.*)", re.DOTALL)

_BOOLEAN_WORDS = ("true", "false", "yes", "no", "on", "off", "1", "0")
"""What follows a flag without a value if somebody gives it one; a file of such a name is written ./true."""

_FILE_ENDINGS = (".yaml", ".yml")

_ELSEWHERE = {
    "--group-query-attention": "is implied by --num-query-groups; leave it out",
    "--num-layers-per-virtual-pipeline-stage": "is the layers of one chunk; give the number of chunks with "
    "--virtual-pipeline-model-parallel-size",
    "--save": "is decided by the run's name: --name NAME writes runs/NAME/checkpoints",
    "--load": "is decided by the run's name: a run whose directory exists resumes; to start from another run's weights "
    "give --pretrained-checkpoint",
    "--tensorboard-dir": "is runs/NAME/tensorboard; choose NAME with --name",
    "--train-samples": "is train_iters x global_batch_size; give --train-iters",
    "--fp16": "is not offered; --bf16 needs no loss scaling",
}
"""Megatron flags without a key of their own here, and what to type instead."""


@dataclass(frozen=True)
class CommandLine:
    """What was typed after the verb."""

    positionals: tuple[str, ...]
    overrides: tuple[str, ...]
    """The tokens that are no positionals, in order; what :func:`megatron_slm.config.load.load` takes."""
    given: tuple[Given, ...]
    problems: tuple[str, ...]


def read(tokens: Sequence[str]) -> CommandLine:
    """Sort tokens into positionals and given values; what cannot be understood becomes a problem."""
    positionals: list[str] = []
    overrides: list[str] = []
    given: list[Given] = []
    problems: list[str] = []
    position = 0
    while position < len(tokens):
        token = tokens[position]
        used = 1
        if token.startswith("-") and token != "-":
            used = _read_flag(tokens, position, given, problems)
            overrides += tokens[position : position + used]
        elif match := _ASSIGNMENT.fullmatch(token):
            _assign(match[1], match[2], token, given=given, problems=problems)
            overrides.append(token)
        else:
            positionals.append(token)
        position += used
    problems += _conflicts(given)
    return CommandLine(tuple(positionals), tuple(overrides), tuple(given), tuple(problems))


def _assign(name: str, text: str, written: str, *, given: list[Given], problems: list[str]) -> None:
    """Read ``name=text``."""
    if name in all_keys():
        given.append(Given(name, _strip_brackets(all_keys()[name], text), SOURCE, written=written))
    else:
        problems.append(unknown_key(name, SOURCE))


def _read_flag(tokens: Sequence[str], position: int, given: list[Given], problems: list[str]) -> int:
    """Read the flag at ``position``; returns how many tokens it took."""
    flag, equals, text = tokens[position].partition("=")
    if flag in _ELSEWHERE:
        problems.append(f"{flag} ({SOURCE}) {_ELSEWHERE[flag]}.")
        return 1 + (not equals and _value_follows(tokens, position))
    if flag not in flag_table():
        problems.append(unknown_flag(flag, SOURCE))
        return 1 + (not equals and _value_follows(tokens, position))
    key, constant = flag_table()[flag]
    if equals:
        if constant is not None:
            return _assign_boolean(key, constant, tokens[position], given, problems)
        given.append(Given(key.name, text, SOURCE, written=tokens[position]))
        return 1
    if constant is not None:
        following = tokens[position + 1] if position + 1 < len(tokens) else ""
        if following.lower() in _BOOLEAN_WORDS:
            problems.append(_takes_no_value(key, flag, f"{flag} {following}"))
            return 2
        given.append(Given(key.name, constant, SOURCE, written=flag))
        return 1
    values = _values_after(tokens, position, several=key.kind is tuple)
    if not values:
        problems.append(f"{flag} ({SOURCE}) needs a value: {key.expects}.")
        return 1
    text = ",".join(values)
    given.append(Given(key.name, text, SOURCE, written=f"{flag} {' '.join(values)}"))
    return 1 + len(values)


def _assign_boolean(key: Key, constant: str, written: str, given: list[Given], problems: list[str]) -> int:
    """Read ``--bf16=false``; a flag that already says no takes no value."""
    flag, _, text = written.partition("=")
    if constant == "true":
        given.append(Given(key.name, text, SOURCE, written=written))
    else:
        problems.append(_takes_no_value(key, flag, written))
    return 1


def _takes_no_value(key: Key, flag: str, written: str) -> str:
    """A flag of a boolean that was given a value."""
    yes, no = key.own_flag, f"--no-{key.own_flag[2:]}"
    return (
        f"{written} ({SOURCE}): {flag} takes no value; use {yes} or {key.name}=true, {no} or {key.name}=false for the "
        "opposite."
    )


def _values_after(tokens: Sequence[str], position: int, *, several: bool) -> list[str]:
    """The value that follows a flag; for a list every token up to the next flag, assignment or file."""
    values: list[str] = []
    for token in tokens[position + 1 :]:
        if token.startswith("--") or (values and not several):
            break
        if several and (_ASSIGNMENT.fullmatch(token) or token.endswith(_FILE_ENDINGS)):
            break
        values.append(token)
    return values


def _value_follows(tokens: Sequence[str], position: int) -> bool:
    """Whether the token after a flag of unknown arity looks like its value."""
    following = tokens[position + 1] if position + 1 < len(tokens) else "--"
    return not (following.startswith("--") or _ASSIGNMENT.fullmatch(following) or following.endswith(_FILE_ENDINGS))


def _strip_brackets(key: Key, text: str) -> str:
    """``[a,b]`` -> ``a,b`` for a list key."""
    return text[1:-1] if key.kind is tuple and text.startswith("[") and text.endswith("]") else text


def _conflicts(given: Sequence[Given]) -> list[str]:
    """One sentence for every key that was typed twice with different values."""
    first: dict[str, Given] = {}
    problems = []
    for value in given:
        earlier = first.setdefault(value.key, value)
        if not _equal(earlier, value):
            problems.append(
                f"{value.key} is given twice on the command line, as {earlier.written} and as {value.written}; keep "
                "one."
            )
    return problems


def _equal(one: Given, other: Given) -> bool:
    """Whether two spellings of one key mean the same value."""
    key = all_keys()[one.key]
    try:
        return bool(parse(key, one) == parse(key, other))
    except ConfigError:
        return one.text == other.text
