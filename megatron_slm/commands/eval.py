"""The verbs ``eval`` and ``eval compare``: what a model knows, and whether another one knows more."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slm.commands.command import EXIT_OK, Verb, parser_of, path_of
from megatron_slm.commands.model_ranks import on_ranks_of
from megatron_slm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_slm.launch.environment import RankEnvironment
    from megatron_slm.run_eval import Wanted

NOTES = """\
The rows of a JSONL file say what is asked: {"text"} or {"prompt", "completion"} the loss of held-out text; {"prompt",
"choices", "answer"} the likeliest choice, as a whole, by token and by byte; {"prompt", "verifier", ...} an answer that
is drawn and judged (arithmetic, exact_match, regex, format, json_valid, unit_tests); {"prompt", "completion",
"expected": [low, high]} a log-probability in nats that lies in a range. Rows may have "id" and "source". The model is
divided as its configuration says; --one-rank loads it on one."""

COMPARE_NOTES = """\
The items are drawn again and again with replacement, the same for both models, and 95 % of the differences lie in the
interval. Where it holds 0 the verdict is "no real difference"; "detectable" is the difference that so many items would
have shown four times out of five. Each number is judged for itself: of twenty one may differ by chance."""


def evaluate(name: str, tokens: Sequence[str]) -> int:
    """``mslm eval``: measure a checkpoint."""
    own = _parser(name).parse_args(tokens)
    wanted = _wanted(own)
    return on_ranks_of(
        own.run,
        lambda environment: _measure(own, wanted, environment),
        ["eval", *tokens],
        one_rank=own.one_rank,
    )


def compare(name: str, tokens: Sequence[str]) -> int:
    """``mslm eval compare``: two results of the same items."""
    parser = parser_of(
        name,
        "A.json B.json [--seed N] [--resamples N]",
        "Compare two results of mslm eval --out item by item: an interval around every difference, and a verdict, "
        "which may be that there is none.",
        example="mslm eval compare before.json after.json",
        notes=COMPARE_NOTES,
    )
    parser.add_argument("first", type=path_of, metavar="A.json")
    parser.add_argument("second", type=path_of, metavar="B.json")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling (default: %(default)s)")
    parser.add_argument("--resamples", type=int, default=10_000, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    own = parser.parse_args(tokens)
    if own.resamples < 100 or own.seed < 0:
        raise ConfigError(f"--resamples {own.resamples} must be at least 100, --seed {own.seed} at least 0.")
    from megatron_slm.evaluate import compare as comparing

    first, second = comparing.read_result(own.first), comparing.read_result(own.second)
    rows = comparing.compare(first, second, resamples=own.resamples, seed=own.seed)
    if own.json:
        print(
            json.dumps(
                [
                    {
                        "task": row.task,
                        "metric": row.metric,
                        **row.found._asdict(),
                        "difference": row.found.difference,
                        "verdict": row.verdict,
                        "left_out": row.left_out,
                    }
                    for row in rows
                ]
            )
        )
    else:
        print(f"A: {first['model']}\nB: {second['model']}\n\n{comparing.table(rows)}")
    return EXIT_OK


def _parser(name: str) -> argparse.ArgumentParser:
    parser = parser_of(
        name,
        "RUN [--task FILE ...] [--data DIR ...] [--out FILE] [options]",
        "Measure the newest checkpoint of a run, or one of its checkpoints, on held-out text, multiple choice, answers "
        "that a verifier judges and golden prompts.",
        example="mslm eval runs/sft --task questions.jsonl --out sft.json",
        notes=NOTES,
    )
    parser.add_argument("run", type=path_of, metavar="RUN", help="directory of a run, or one of its checkpoints")
    parser.add_argument("--task", type=path_of, action="append", default=[], metavar="FILE", help="items, one a line")
    parser.add_argument(
        "--data", type=path_of, action="append", default=[], metavar="DIR", help="held-out split of prepared data"
    )
    parser.add_argument("--out", type=path_of, metavar="FILE", help="write the result, with every item, as JSON")
    parser.add_argument("--limit", type=int, metavar="N", help="items of a task at most (of --data 1000)")
    parser.add_argument(
        "--template", metavar="NAME", help="write prompts with chatml, plain, a file, or the model's own"
    )
    parser.add_argument(
        "--samples", type=int, default=1, metavar="N", help="answers to a prompt (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="of the draws (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="S", help="of a verifier (default: %(default)s)")
    parser.add_argument("--one-rank", action="store_true", help="on one rank, whatever the run's layout")
    parser.add_argument("--ema", action="store_true", help="use the averages of the weights (train.ema_decay)")
    return parser


def _wanted(own: argparse.Namespace) -> Wanted:
    """What the command line asks for.

    Raises:
        ConfigError: nothing, or a value out of its range.
    """
    if not own.task and not own.data:
        raise ConfigError("Nothing is asked: give --task FILE with items, or --data DIR with a held-out split.")
    least = {"--limit": own.limit, "--samples": own.samples, "--max-new-tokens": own.max_new_tokens}
    for option, value in {**least, "--batch-size": own.batch_size}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value} must be at least 1.")
    if not 0 <= own.temperature < float("inf") or not 0 < own.top_p <= 1 or own.seed < 0:
        raise ConfigError(
            f"--temperature {own.temperature} must be at least 0 and finite, --top-p {own.top_p} above 0 and at most "
            f"1, --seed {own.seed} at least 0."
        )
    if not own.timeout > 0:
        raise ConfigError(f"--timeout {own.timeout} must be above 0.")
    if own.out is not None and not own.out.parent.is_dir():
        raise ConfigError(f"--out {own.out}: there is no directory {own.out.parent}. Make it first.")
    from megatron_slm.run_eval import Wanted
    from megatron_slm.run_generate import Manner

    return Wanted(
        tuple(own.task),
        tuple(own.data),
        limit=own.limit,
        template=own.template,
        samples=own.samples,
        manner=Manner(own.max_new_tokens, own.temperature, 0, own.top_p, own.seed, own.ema),
        batch_size=own.batch_size,
        timeout_s=own.timeout,
    )


def _measure(own: argparse.Namespace, wanted: Wanted, environment: RankEnvironment | None) -> int:
    """The work of one rank; the first one prints and writes."""
    from megatron_slm.run_eval import evaluate as evaluated

    result = evaluated(own.run, wanted, environment=environment)
    if result is None:
        return EXIT_OK
    print(_shown(result), flush=True)
    if own.out is not None:
        _write(own.out, result)
    return EXIT_OK


def _write(path: Path, result: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(json.dumps(_finite(result), ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"Cannot write the result {path}: {error.strerror}. Give another --out.") from error


def _finite(found: Any) -> Any:
    """The same with null for what is no number, which JSON does not know."""
    if isinstance(found, dict):
        return {name: _finite(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _shown(result: dict[str, Any]) -> str:
    """A table of every task and its slices."""
    from megatron_slm.evaluate.compare import aligned

    lines: list[tuple[str, str, str]] = [("task", "slice", "")]
    for task in result["tasks"]:
        lines.append((task["name"], "all", _numbers(task["metrics"])))
        if "calibration" in task:
            found = task["calibration"]
            lines.append(("", "calibration", f"ece {found['ece']:.4f}  brier {found['brier']:.4f}"))
        for name, groups in task["slices"].items():
            lines += [("", f"{name} {key}", _numbers(values)) for key, values in groups.items()]
        if task.get("first_failure"):
            lines.append(("", "unscored", f"first failure: {task['first_failure']}"))
        if task["kind"] == "golden":
            lines += [
                ("", f"item {item['id']}", _miss(item)) for item in task["items"] if not item["values"]["in_range"]
            ]
    return f"{result['model']}, step {result['step']}\n{aligned(lines)}"


def _numbers(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _miss(item: dict[str, Any]) -> str:
    values = item["values"]
    return f"log-probability {values['logprob']:.4f} is not in [{values['low']:g}, {values['high']:g}]"


VERBS: Mapping[str, Verb] = {
    "eval": Verb("measure a checkpoint: held-out text, choices, judged answers, golden prompts", evaluate),
    "eval compare": Verb("compare two results item by item, with intervals", compare),
}
