"""The command line as a person meets it: exit codes, messages, and no torch where none is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm.cli import VERBS, main

ROOT = Path(__file__).resolve().parents[2]


def test_check_lists_every_violation_and_ends_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("preset: tiny\nparallel:\n  tensor_model_parallel_size: 3\nprecision: {bf16: true, fp64: true}\n")
    assert main(["check", str(path), "--num-layers", "5", "--pipeline-model-parallel-size=2"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    for part in ("num_attention_heads = 8", "num_layers = 5", f"bf16 = true (file {path}:4)", "data.data_path is not"):
        assert part in printed.err
    assert re.search(r"^7 rules violated$", printed.err, re.MULTILINE)


def test_check_lists_wrong_keys_and_wrong_values_beside_the_rules(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["train.foo=1", "--bf16", "true", "model.num_layers=two"]
    assert main(["check", "--skip-files", "--preset", "tiny", "--tensor-model-parallel-size=3", *wrong]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    for part in (
        "train.foo (command line) is no key",
        "--bf16 takes no value",
        "num_layers = two",
        "num_attention_heads = 8",
    ):
        assert part in printed.err
    last = printed.err.splitlines()[-1]
    assert last == "3 problems in keys and values; 4 rules violated, with those keys as if they were not given"
    assert main(["check", "--skip-files", "--preset", "tiny", "train.foo=1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "1 problem in keys and values"


def test_check_shows_the_layout_of_an_accepted_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--skip-files", "preset=llama3-405b", "--world-size=256", *_flags(tp=8, pp=16)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "ok: llama3-405b" in printed.out
    assert "256 = tp 8 x cp 1 x dp 2 x pp 16" in printed.out
    assert "7, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 7" in printed.out
    assert "4, each of 1 x 8192 tokens" in printed.out
    assert "405,853,388,800" in printed.out


def _flags(tp: int, pp: int) -> list[str]:
    return [f"--tensor-model-parallel-size={tp}", f"--pipeline-model-parallel-size={pp}"]


@pytest.mark.parametrize(
    "tokens",
    [["check", "--preset", "tiny", "--skip-files"], ["check", "--preset", "tiny", "--bf16", "--fp64"], ["--help"]],
)
def test_torch_is_not_imported(tokens: list[str]) -> None:
    program = (
        "import sys; from megatron_slm.cli import main; main(sys.argv[1:]); "
        "print(*sorted({'torch', 'megatron', 'numpy'} & sys.modules.keys()), file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, *tokens], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert ended.stderr.splitlines()[-1] == ""


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["chek"], ("chek is no verb", "did you mean check?")),
        (["data", "prepar"], ("data prepar is no verb", "data prepare")),
        (["fly"], ("the verbs are train, check",)),
        (["check", "absent.yaml"], ("no configuration file absent.yaml",)),
        (["check", "a.yaml", "b.yaml"], ("One CONFIG is read", "a.yaml, b.yaml")),
        (["check", "--num-layer", "2"], ("--num-layer", "--num-layers")),
        (["check", "model.num_layers=two"], ("model.num_layers = two", "a whole number")),
        (["train", "--preset", "tiny", "--bf16", "--fp64"], ("exclude each other", "data.data_path is not set")),
        (["data", "prepare", "text.jsonl"], ("--output",)),
        (["data", "inspect"], ("data.data_path is not set",)),
    ],
)
def test_refusals_end_with_two_and_no_traceback(tokens: list[str], words: tuple[str, ...]) -> None:
    ended = _mslm(*tokens)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    assert all(word in ended.stderr for word in words), ended.stderr


def _mslm(*tokens: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_slm.cli", *tokens],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_help_with_one_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: mslm {name} ")
    assert len(re.findall(rf"^  mslm {name} \S", printed, re.MULTILINE)) == 1


def test_the_example_of_check_works_as_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--help"]) == 0
    example = re.search(r"^  mslm (check .*)$", capsys.readouterr().out, re.MULTILINE)
    assert example is not None and main(example[1].split()) == 0
    assert main(["--help"]) == 0
    example = re.search(r"^  mslm (check --.*)$", capsys.readouterr().out, re.MULTILINE)
    assert example is not None and main(example[1].split()) == 0


def test_shares_that_are_not_those_of_the_weights_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["check", "--preset", "tiny", "--skip-files", "data.sources=a=x,b=y"]
    assert main([*command, "data.weights=a=0.333333,b=0.666667"]) == 0
    assert "shares from" not in capsys.readouterr().out
    assert main([*command, "data.weights=a=0.1234567,b=0.8765433", "data.phases=9: a=1 b=1"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "shares from" in line]
    assert line.startswith("shares from sample 0 on: a 0.1235, b 0.8765; ") and "rounded to multiples" in line


def test_a_prepared_corpus_is_inspected_and_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"{word} and {word} are read {count} times" for count in range(40) for word in "abcdef")
    )
    corpus = str(tmp_path / "corpus")
    assert main(["data", "prepare", str(text), "--output", corpus, "--vocab-size", "290"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["num_documents"] > 100
    assert main(["data", "inspect", "--data-path", corpus, "--seq-length", "16", "--seed", "7", "--index", "3"]) == 0
    assert "train position 3" in capsys.readouterr().out
    assert main(["data", "inspect", "--data-path", corpus, "--split", "test"]) == 2
    assert main(["check", "--preset", "tiny", "--data-path", corpus]) == 0


def test_top_level(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--version"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in VERBS)
    assert "megatron-core 0.16" in printed


@pytest.mark.parametrize("group", ["data", "checkpoint"])
def test_the_verbs_of_a_group_have_help(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("-h", "--help"):
        assert main([group, option]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"usage: mslm {group} VERB")
        assert all((f"  {name} " in printed) == name.startswith(f"{group} ") for name in VERBS)


def test_the_configuration_reference_is_current() -> None:
    ended = subprocess.run(
        [sys.executable, "tools/config_reference.py", "--check"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_a_reader_that_leaves_early_causes_no_traceback() -> None:
    command = [sys.executable, "-m", "megatron_slm.cli", "check", "--preset", "tiny", "--skip-files"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60)
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")
