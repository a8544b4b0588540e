"""A checkpoint cut anew: the same tensors, one piece in memory at a time, whole or not there at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_slm.cli import main
from megatron_slm.errors import CheckpointError, UserError
from megatron_slm.train import manifest, recovery
from megatron_slm.train.global_hash import combined, tensor_hashes
from megatron_slm.train.payload_index import read_index
from megatron_slm.train.reshard import reshard
from tests.checkpoints import by_layer, whole, write_run

ROOT = Path(__file__).resolve().parents[2]
TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
BACK = ("--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1")


def source_run(run: Path, layers: int = 4, width: int = 8) -> Path:
    """A run with a checkpoint of one rank: a few weights of a gated MLP, and their first moments."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "decoder.layers.mlp.linear_fc1.weight": torch.randn(layers, 4 * width, width, generator=generator),
        "decoder.layers.mlp.linear_fc2.weight": torch.randn(layers, width, 2 * width, generator=generator),
    }
    cut = [
        (p + name, data, by_layer(data, halves="fc1" in name))
        for p in ("", "optimizer.state.exp_avg.")
        for name, data in tensors.items()
    ]
    norm = torch.randn(width, generator=generator)
    write_run(run, [*cut, ("decoder.final_layernorm.weight", norm, whole(norm))], f"model.num_layers={layers}")
    return run


def chunks(checkpoint: Path) -> dict[str, set[tuple[object, ...]]]:
    return {
        name: {(chunk.offsets, chunk.sizes, chunk.span.file) for chunk in tensor.chunks}
        for name, tensor in read_index(checkpoint).tensors.items()
    }


def hash_of(checkpoint: Path) -> str:
    return combined(tensor_hashes(checkpoint))


def test_there_and_back_is_the_same_checkpoint(tmp_path: Path) -> None:
    first = source_run(tmp_path / "first")
    second = reshard(first, tmp_path / "second", [*TP2, *PP2])
    third = reshard(tmp_path / "second", tmp_path / "third", BACK)
    origin = recovery.find(first)
    assert second.num_files == 4 and third.num_files == 1
    assert second.global_hash == third.global_hash == hash_of(origin.path)
    assert chunks(third.path) == chunks(origin.path) != chunks(second.path)
    for name in ("common.pt", "metadata.json", "tokenizer/tokenizer.model", "__0_0.distcp"):
        if not name.endswith(".distcp"):  # the pieces' order in a file is no part of it
            assert (third.path / name).read_bytes() == (origin.path / name).read_bytes(), name
    state = recovery.find(tmp_path / "second").state
    assert (state.step, state.consumed_samples) == (origin.state.step, origin.state.consumed_samples)
    assert state.layout == {**origin.state.layout, "world_size": 4, "tp": 2, "pp": 2}
    assert state.resharded_from == origin.state.layout and state.global_hash == second.global_hash


def peak_while_resharding(source: Path, small: Path, output: Path) -> float:
    """MB of memory that a process takes for it beyond what it has after a small one, which loads what is needed."""
    program = (
        "import sys; from pathlib import Path; from megatron_slm.train.reshard import reshard\n"
        "def size(key): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(key))\n"
        "source, small, output = map(Path, sys.argv[1:]); tp2 = ['--tensor-model-parallel-size', '2']\n"
        "reshard(small, output.with_name('small-output'), tp2)\n"
        "open('/proc/self/clear_refs', 'w').write('5'); before = size('VmRSS:')\n"
        "reshard(source, output, tp2)\n"
        "print((size('VmHWM:') - before) / 1024)"
    )
    command = [sys.executable, "-c", program, str(source), str(small), str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def test_memory_is_about_one_piece(tmp_path: Path) -> None:
    source = source_run(tmp_path / "source", layers=6, width=640)
    index = read_index(recovery.find(source).path)
    total = sum(tensor.num_bytes for tensor in index.tensors.values()) / 2**20
    assert total > 100
    # Pieces of the source have 3 MB, hashing and the manifest read 1 and 4 MB at a time in a few threads.
    assert peak_while_resharding(source, source_run(tmp_path / "small"), tmp_path / "target") < 24


def test_what_is_refused_leaves_nothing(tmp_path: Path) -> None:
    source = source_run(tmp_path / "source")
    (tmp_path / "there").mkdir()
    for output, overrides, said in (
        ("there", TP2, "exists"),
        ("new", ["parallel.tensor_model_parallel_size=3"], "tensor_model_parallel_size"),
        ("new", ["--pipeline-model-parallel-size", "3"], "num_layers"),
        ("new", [*TP2, "parallel.world_size=3"], "world size 3"),
        ("new", [*TP2, "model.num_layers=2"], "model.num_layers cannot be changed"),
        ("new", ["--no-such-flag", "1"], "no-such-flag"),
        ("new", [], "of this layout already"),
    ):
        with pytest.raises(UserError, match=said):
            reshard(source, tmp_path / output, overrides)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["source", "there"], said


@pytest.mark.parametrize("damage", ["flip", "truncate", "index"])
def test_a_damaged_source_is_refused(tmp_path: Path, damage: str) -> None:
    checkpoint = recovery.find(source_run(tmp_path / "source")).path
    file = checkpoint / (".metadata" if damage == "index" else "__0_0.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if damage == "flip" else content[:-9])
    with pytest.raises(CheckpointError, match=file.name):
        reshard(checkpoint, tmp_path / "target", TP2)
    assert not (tmp_path / "target").exists() and not list(tmp_path.glob(".tmp-*"))


def test_what_differs_after_writing_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_slm.train import reshard as room

    read = room._read_piece

    def with_a_flipped_bit(*arguments: object) -> torch.Tensor:
        piece = read(*arguments)  # type: ignore[arg-type]
        piece.view(torch.int32).view(-1)[0] ^= 1
        return piece

    monkeypatch.setattr(room, "_read_piece", with_a_flipped_bit)
    with pytest.raises(CheckpointError, match=r"not what was read \(decoder.final_layernorm.weight: other values"):
        reshard(source_run(tmp_path / "source"), tmp_path / "target", TP2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


# Forks a child for every fifth file operation of a reshard, and kills the child there.
KILLER = """
import os, signal, sys
from pathlib import Path
from megatron_slm.train.reshard import reshard

OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
source, outputs = Path(sys.argv[1]), Path(sys.argv[2])
seen = 0

def count(event, arguments):
    global seen
    if event in OPERATIONS and (event != "open" or "w" in (arguments[1] or "")):
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

kill_at, status = 0, 1
while status:
    kill_at += 5
    child = os.fork()
    if child == 0:
        sys.addaudithook(count)
        reshard(source, outputs / str(kill_at), ["--tensor-model-parallel-size", "2"])
        os._exit(0)
    status = os.waitpid(child, 0)[1]
print(kill_at)
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint_or_none(tmp_path: Path) -> None:
    source = source_run(tmp_path / "source", layers=2)
    (tmp_path / "outputs").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLER, str(source), str(tmp_path / "outputs")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=120)
    runs = [entry for entry in (tmp_path / "outputs").iterdir() if not entry.name.startswith(".tmp-")]
    assert int(done.stdout) > 10, done.stdout
    assert str(int(done.stdout)) in {run.name for run in runs}
    for run in runs:
        assert hash_of(recovery.find(run).path) == hash_of(recovery.find(source).path)
    manifest.verify(recovery.find(source).path)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = str(source_run(tmp_path / "source")), str(tmp_path / "target")
    assert main(["checkpoint", "reshard", *TP2, source, "--output", target]) == 0
    assert "tp 2" in capsys.readouterr().out
    assert main(["checkpoint", "hash", source, target]) == 0
    first, second = (line.split()[0] for line in capsys.readouterr().out.splitlines())
    assert first == second and len(first) == 64
    for verb in ("verify", "inspect"):
        assert main(["checkpoint", verb, target]) == 0
        assert first in capsys.readouterr().out
    assert main(["checkpoint", "list", target]) == 0
    assert "yes" in capsys.readouterr().out
    other = str(source_run(tmp_path / "other", layers=2))
    assert main(["checkpoint", "hash", source, other]) == 1
    assert "decoder.layers.mlp.linear_fc1.weight: float32 4x32x8 and float32 2x32x8" in capsys.readouterr().out
    assert main(["checkpoint", "hash", source, other, "--weights"]) == 1
    assert main(["checkpoint", "reshard", source, "--output", target]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["checkpoint", "reshard", "--output", target + "2"]) == 2


def test_a_state_that_promises_another_hash_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = reshard(source_run(tmp_path / "source"), tmp_path / "target", TP2)
    state = json.loads((done.path / "state.json").read_text())
    (done.path / "state.json").write_text(json.dumps({**state, "global_hash": "0" * 64}))
    (done.path / "manifest.json").unlink()
    manifest.seal(done.path, step=3, identity="")
    assert main(["checkpoint", "hash", str(done.path)]) == 2
    assert "its state.json says 000" in capsys.readouterr().err
