"""A stored teacher under several layouts: what is stored, what is trained from it, and what the command refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_slm.data.examples.store import ExampleStore
from megatron_slm.data.examples.teacher import TeacherStore
from tests import alignment, runs
from tests.ranks import RankFailure, run_ranks

ROOT = Path(__file__).resolve().parents[2]
TOKENS, HIDDEN, VOCAB, PADDED = 23, 8, 50, 64
TOP_K = 8
SHAPE = (
    "model.num_layers=2",
    f"model.seq_length={alignment.SEQ_LENGTH}",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.train_iters=3",
    "train.eval_iters=1",
    "precision.fp64=true",
    "optimizer.lr=1e-3",
)
TP2 = ("parallel.tensor_model_parallel_size=2",)
PP2 = ("parallel.pipeline_model_parallel_size=2",)


def top_on_rank(top_k: int, temperature: float) -> Any:
    from megatron_slm.parallel.vocab_scores import Vocabulary
    from megatron_slm.stages.top_tokens import vocab_parallel_top

    hidden, weight = problem()
    rows = PADDED // dist.get_world_size()
    mine = weight[dist.get_rank() * rows :][:rows]
    return vocab_parallel_top(hidden, mine, top_k, group=dist.group.WORLD, vocabulary=Vocabulary(VOCAB, temperature))


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(size, HIDDEN, generator=generator, dtype=torch.float64) for size in (TOKENS, PADDED))  # type: ignore[return-value]


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (20, 0.7), (VOCAB, 1.0)])
def test_the_top_of_a_divided_vocabulary(world_size: int, top_k: int, temperature: float) -> None:
    """Four ranks have 16 rows each, of which the last has 14 that are padding, and 20 are more than any has."""
    hidden, weight = problem()
    whole = (hidden @ weight[:VOCAB].t() / temperature).log_softmax(-1)
    expected = whole.topk(top_k)
    rest = whole.scatter(1, expected.indices, float("-inf")).logsumexp(-1)
    for top in run_ranks(top_on_rank, world_size, top_k, temperature):
        assert torch.equal(top.ids, expected.indices)
        torch.testing.assert_close(top.logprobs, expected.values, rtol=0, atol=1e-12)
        torch.testing.assert_close(top.rest, rest, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a smaller student, and what the teacher says: of eight tokens on two ranks, of all on one."""
    home = tmp_path_factory.mktemp("stored")
    data = alignment.compiled(home)["chat"]
    sft = ("stage=sft", "train.train_iters=12", "optimizer.lr=3e-3")
    assert runs.train(home / "teacher", data, 2, *SHAPE, *sft, *TP2) == 0
    assert runs.train(home / "student", data, 1, *SHAPE, *sft, "model.hidden_size=16", "train.train_iters=2") == 0
    assert run_ranks(stored, 2, home, "eight", TOP_K)[1] is None
    vocab_size = ExampleStore.open(data / "train").vocab_size
    assert run_ranks(stored, 1, home, "all", vocab_size)[0]["splits"]["train"]["covered"] == pytest.approx(1.0)
    return home


def stored(home: Path, output: str, top_k: int, examples: str = "chat", run: str = "teacher") -> Any:
    """``mslm data teacher`` on this rank's part of the model, or on one rank alone."""
    from megatron_slm.run_teacher import Wanted, store_teacher

    wanted = Wanted(home / run, home / examples, home / output, top_k)
    if dist.get_world_size() == 1:
        dist.destroy_process_group()
        return store_teacher(wanted)
    return store_teacher(wanted, environment=runs.rank_environment())


def distilled(home: Path, name: str, ranks: int, *options: str) -> list[float]:
    """Losses of a run of the student, the held-out one behind them."""
    own = (f"checkpoint.pretrained_checkpoint={home / 'student'}", "stage=distill", "model.hidden_size=16")
    assert runs.train(home / name, home / "chat", ranks, *SHAPE, *own, *options) == 0
    held_out = runs.records(home / name, "validation.jsonl")[-1]["loss"]
    return [record["loss"] for record in runs.records(home / name)] + [held_out]


def from_store(home: Path, output: str, top_k: int, *options: str) -> tuple[str, ...]:
    return (f"distill.distill_teacher={home / output}", f"distill.teacher_topk={top_k}", *options)


def test_what_is_stored_does_not_depend_on_the_layout(made: Path) -> None:
    for split in ("train", "valid"):
        examples = ExampleStore.open(made / "chat" / split)
        eight, whole = (TeacherStore.open(made / name / split, "hash") for name in ("eight", "all"))
        for document in range(examples.num_documents):
            labels = int(np.count_nonzero(examples.weights(document)[1:]))
            assert eight.ids(document).shape == (labels, TOP_K)
            assert eight.ids(document).tolist() == whole.ids(document)[:, :TOP_K].tolist()
            np.testing.assert_allclose(eight.logprobs(document), whole.logprobs(document)[:, :TOP_K], atol=1e-6)
            rest = np.logaddexp.reduce(whole.logprobs(document)[:, TOP_K:].astype(float), axis=1)
            np.testing.assert_allclose(eight.rest(document), rest, atol=1e-5)


def test_a_stored_teacher_is_the_running_one_as_far_as_it_goes(made: Path) -> None:
    """All tokens give the loss of the running teacher. Of eight: any layout the same, from a store of more the same."""
    live = distilled(made, "live", 1, f"distill.distill_teacher={made / 'teacher'}")
    assert distilled(made, "whole", 1, *from_store(made, "all", 290)) == pytest.approx(live, abs=1e-6)
    eight = distilled(made, "one", 1, *from_store(made, "eight", TOP_K))
    assert max(np.subtract(live, eight)) > 1e-4 and eight[0] == pytest.approx(restricted(made), abs=1e-6)
    assert distilled(made, "cut", 1, *from_store(made, "all", TOP_K)) == pytest.approx(eight, abs=1e-6)
    assert distilled(made, "divided", 4, *from_store(made, "eight", TOP_K), *TP2, *PP2) == pytest.approx(
        eight, abs=1e-6
    )


def restricted(home: Path) -> float:
    """The first step's loss from the whole softmax of both models: forward KL of the eight tokens and the rest."""
    teacher, student = (run_ranks(log_softmax, 1, home, run)[0] for run in ("teacher", "student"))
    ids = teacher.topk(TOP_K).indices
    parts = []
    for model in (teacher, student):
        chosen = model.gather(1, ids)
        rest = model.scatter(1, ids, float("-inf")).logsumexp(-1, keepdim=True)
        parts.append(torch.cat([chosen, rest], dim=1))
    p, q = parts
    return float((p.exp() * (p - q)).sum(-1).mean())


def log_softmax(home: Path, run: str) -> torch.Tensor:
    """[labels, V] at every label of the first step."""
    from megatron_slm import run_generate
    from megatron_slm.data.cursor import Cursor
    from megatron_slm.data.examples.rows import open_rows
    from megatron_slm.parallel.gradients import unwrap
    from megatron_slm.rollout.score import scores
    from megatron_slm.train import recovery

    dist.destroy_process_group()
    order = Cursor.from_dict(recovery.find(home / "one").state.cursor).order
    rows: Any = open_rows(home / "chat" / "train", alignment.SEQ_LENGTH)
    batch = rows.batch([order.sample_id(at).index for at in range(8)])
    with run_generate.speaker(home / run) as speaker:
        unwrap(speaker.built.chunks[0]).ending = partial(_every_token, speaker.vocab_size)
        (found,) = scores(speaker.built.chunks, [batch], seq_length=alignment.SEQ_LENGTH, groups=speaker.built.groups)
    return found[batch["loss_mask"] != 0]


def _every_token(vocab_size: int, hidden: Any, weight: Any, fields: Any, group: Any) -> torch.Tensor:
    batch, sequence = fields["labels"].shape
    whole = (hidden @ weight[:vocab_size].t()).log_softmax(-1)
    return whole.view(sequence, batch, -1).transpose(0, 1).contiguous()


def test_the_command_stores_once_and_refuses_in_one_sentence(made: Path, tmp_path: Path) -> None:
    again = run_ranks(stored, 1, made, "eight", TOP_K)[0]
    assert again["already_stored"] and again["request"]["top_k"] == TOP_K
    said = {
        "eight.*holds something else: top_k": ("eight", 9, "chat"),
        "more than the teacher's vocabulary": ("new", 291, "chat"),
        "preference examples": ("new", TOP_K, "preference"),
        "no split of compiled examples": ("new", TOP_K, "nowhere"),
        "exists and holds no stored teacher": ("chat.jsonl", TOP_K, "chat"),
    }
    for words, given in said.items():
        with pytest.raises(RankFailure, match=words) as refusal:
            run_ranks(stored, 1, made, *given)
        assert refusal.value.code == 2
    assert not (made / "new").exists() and not list(made.glob(".new*"))
    other = alignment_with_another_tokenizer(tmp_path)
    output = tmp_path / "said"
    done = mslm(str(made / "teacher"), str(other), "--output", str(output))
    assert done.returncode == 2 and "was made with the tokenizer" in done.stderr and "Traceback" not in done.stderr
    done = mslm(str(made / "teacher"), str(made / "chat"), "--output", str(output), "--top-k", "2")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["splits"] and TeacherStore.open(output / "valid").top_k == 2


def alignment_with_another_tokenizer(directory: Path) -> Path:
    from tests.example_files import compiled, pieces

    pieces(directory / "tokenizer")
    compiled(directory, [{"prompt": "one", "completion": "two"}], directory / "tokenizer")
    return directory / "out"


def mslm(*tokens: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command: Sequence[str] = [sys.executable, "-m", "megatron_slm.cli", "data", "teacher", *tokens]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
