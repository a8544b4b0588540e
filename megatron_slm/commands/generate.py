"""The verb ``generate``: continue prompts with a trained model, or talk to it."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slm.commands.command import EXIT_OK, Verb, parser_of, path_of
from megatron_slm.commands.model_ranks import on_ranks_of
from megatron_slm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_slm.launch.environment import RankEnvironment
    from megatron_slm.rollout.chat import Conversation
    from megatron_slm.run_generate import Answer, Manner, Speaker

NOTES = """\
A run whose configuration has tensor- or pipeline-parallel ranks speaks on as many, which mslm starts; --one-rank and
--chat load the whole model on one. With the same seed a prompt gets the same answer on any number of ranks and beside
any other prompts, but for the rounding of the logits. In a chat /reset forgets, /exit leaves, Ctrl-C ends the turn."""


def generate(name: str, tokens: Sequence[str]) -> int:
    """``mslm generate``: what a trained model says after a prompt."""
    own = _parser(name).parse_args(tokens)
    if own.max_new_tokens < 1 or own.top_k < 0 or own.batch_size < 1:
        raise ConfigError(
            f"--max-new-tokens {own.max_new_tokens} and --batch-size {own.batch_size} must be at least 1, --top-k "
            f"{own.top_k} at least 0 (all tokens)."
        )
    if not 0 <= own.temperature < float("inf") or not 0 < own.top_p <= 1:  # nan is refused too
        raise ConfigError(
            f"--temperature {own.temperature} must be at least 0 and finite, --top-p {own.top_p} above 0 and at most 1."
        )
    if own.chat:
        return _chat(own)
    prompts = [own.prompt] if own.prompt is not None else read_prompts(own.prompts)
    return on_ranks_of(
        own.run,
        lambda environment: _say(own, prompts, environment),
        ["generate", *tokens],
        one_rank=own.one_rank,
    )


def _parser(name: str) -> argparse.ArgumentParser:
    parser = parser_of(
        name,
        "RUN --prompt TEXT | --prompts FILE | --chat [options]",
        "Continue prompts with the newest checkpoint of a run, or talk to it.",
        example='mslm generate runs/kjv --prompt "In the beginning"',
        notes=NOTES,
    )
    parser.add_argument("run", type=path_of, metavar="RUN", help="directory of a run, or one of its checkpoints")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT")
    asked.add_argument(
        "--prompts", type=path_of, metavar="FILE", help='a prompt a line; in a .jsonl file {"prompt": "..."}'
    )
    asked.add_argument("--chat", action="store_true", help="talk to the model, with its chat template")
    parser.add_argument("--template", metavar="NAME", help="of the chat: chatml, plain or a file (default: its own)")
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat")
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a prompt: text, tokens, log-probabilities in nats, finished",
    )
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=50, help="draw from so many tokens, 0: all (default: %(default)s)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest of this probability (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the draws (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="prompts at a time (default: %(default)s)"
    )
    parser.add_argument("--one-rank", action="store_true", help="on one rank, whatever the run's layout")
    parser.add_argument("--ema", action="store_true", help="use the averages of the weights (train.ema_decay)")
    return parser


def read_prompts(path: Path) -> list[str]:
    """A prompt a line; of a .jsonl file the ``prompt`` of each object. Empty lines are passed over.

    Raises:
        DataError: the file cannot be read, holds no prompt, or a line is no such object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the prompts {path}: {error}. Give a text or a .jsonl file in UTF-8.") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"{path} holds no prompt. Write one a line.")
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_prompt_of(line, f"{path}, line {number}") for number, line in numbered]


def _prompt_of(line: str, place: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not JSON ({error}). Write one object a line.") from error
    prompt = found.get("prompt") if isinstance(found, dict) else None
    if not isinstance(prompt, str):
        raise DataError(f'{place}: no string under "prompt". Write {{"prompt": "..."}}.')
    return prompt


def _manner(own: argparse.Namespace) -> Manner:
    from megatron_slm.run_generate import Manner

    return Manner(own.max_new_tokens, own.temperature, own.top_k, own.top_p, own.seed, own.ema)


def _say(own: argparse.Namespace, prompts: Sequence[str], environment: RankEnvironment | None) -> int:
    """The work of one rank; the first one prints."""
    from megatron_slm import run_generate

    speaks = environment is None or environment.rank == 0
    if own.prompt is not None and not own.json:
        # The prompt is printed with the first piece: a refusal stands alone.
        unprinted = own.prompt
        for piece in run_generate.generate(own.run, own.prompt, _manner(own), environment=environment):
            if speaks:
                print(unprinted + piece, end="", flush=True)
                unprinted = ""
        if speaks:
            print(unprinted, flush=True)
        return EXIT_OK
    with run_generate.speaker(own.run, ema=own.ema, environment=environment) as speaker:
        answers = speaker.answers(prompts, _manner(own), batch_size=own.batch_size)
    if speaks:
        print(
            "\n".join(map(_line, answers) if own.json else [f"{one.prompt}{one.text}\n" for one in answers]), flush=True
        )
    return EXIT_OK


def _line(answer: Answer) -> str:
    completion = answer.completion
    fields = {
        "prompt": answer.prompt,
        "text": answer.text,
        "tokens": completion.tokens,
        "logprobs": completion.logprobs,
        "raw_logprobs": completion.raw_logprobs,
        "finished": completion.finished,
    }
    return json.dumps(fields, ensure_ascii=False)


def _chat(own: argparse.Namespace) -> int:
    """Turn after turn until the input ends."""
    from megatron_slm import run_generate

    with run_generate.speaker(own.run, ema=own.ema) as speaker:
        from megatron_slm.rollout.chat import Conversation

        conversation = Conversation(speaker.tokenizer, own.template, system=own.system, limit=speaker.position_limit)
        if sys.stdin.isatty():
            importlib.import_module("readline")  # input() then edits the line and remembers those before
            print("/reset forgets, /exit leaves, Ctrl-C ends the turn", file=sys.stderr)
        while (said := _heard()) is not None:
            if said == "/reset":
                conversation.reset()
            elif said:
                _turn(own, speaker, conversation, said)
    return EXIT_OK


def _heard() -> str | None:
    """What the user says; None where there is no more to come."""
    try:
        said = input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return None if said == "/exit" else said


def _turn(own: argparse.Namespace, speaker: Speaker, conversation: Conversation, said: str) -> None:
    """One answer, as it is made."""
    try:
        ids = conversation.ask(said, room=own.max_new_tokens)
    except DataError as error:
        print(f"mslm: {error}", file=sys.stderr)
        return
    answer = ""
    try:
        for piece in speaker.pieces(ids, _manner(own), conversation.stop_ids):
            print(piece, end="", flush=True)
            answer += piece
    except KeyboardInterrupt:
        print(" ...", end="")
    print(flush=True)
    conversation.answered(answer)


VERBS: Mapping[str, Verb] = {
    "generate": Verb("continue prompts with a trained model, or talk to it", generate),
}
