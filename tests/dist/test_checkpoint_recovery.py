"""A damaged checkpoint costs the steps since the one before, not the run; and what the verbs make of checkpoints."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest

from megatron_slm.cli import main
from megatron_slm.train import manifest
from tests import runs

TP2 = ("parallel.tensor_model_parallel_size=2", "checkpoint.save_interval=2", "train.train_iters=6")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    assert runs.train(path, data, 2, *TP2) == 0
    return path


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_the_run_goes_on_from_the_one_before(tmp_path: Path, data: Path, run: Path) -> None:
    """Two of three are damaged, in different ways; the steps made again are the same steps."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    flip(next(runs.checkpoint_path(copy, 6).glob("*.distcp")))
    (runs.checkpoint_path(copy, 4) / "common.pt").unlink()
    assert runs.train(copy, data, 2, *TP2) == 0
    for record in ("log.txt", "progress.txt"):
        said = [line for line in (copy / record).read_text().splitlines() if "not used" in line]
        assert len(said) == 1 and "iter_0000006: __" in said[0] and "iter_0000004: common.pt is missing" in said[0]
        assert "Used instead: iter_0000002; the 4 steps after it will be made again." in said[0]
    assert runs.losses(copy) == runs.losses(run) and sorted(runs.losses(copy)) == [1, 2, 3, 4, 5, 6]
    assert runs.differences(*(runs.contents(runs.checkpoint_path(path, 6)) for path in (copy, run))) == []
    assert main(["checkpoint", "verify", str(copy)]) == 0


def test_an_average_is_a_checkpoint(tmp_path: Path, data: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is the mean to the last bit, and what reads weights reads it."""
    import torch

    averaged = tmp_path / "averaged"
    assert main(["checkpoint", "average", str(run), "--last", "3", "--output", str(averaged)]) == 0
    found = runs.contents(averaged)
    parts = [runs.contents(runs.checkpoint_path(run, step)) for step in (2, 4, 6)]
    weights = [name for name, value in found.items() if isinstance(value, torch.Tensor)]
    assert "output_layer.weight" in weights and not [name for name in weights if name.startswith("optimizer")]
    for name in weights:
        mean = sum(part[name].double() for part in parts) / 3
        assert found[name].equal(mean.to(parts[0][name].dtype)) and not found[name].equal(parts[0][name])
    assert [Path(name).name for name in found["state"]["averaged"]] == ["iter_0000002", "iter_0000004", "iter_0000006"]
    assert main(["checkpoint", "verify", str(averaged)]) == 0
    assert main(["checkpoint", "inspect", str(averaged), "--tensor", "output_layer.weight"]) == 0
    assert "0 of 16384 not finite" in capsys.readouterr().out
    start = f"checkpoint.pretrained_checkpoint={averaged}"
    assert runs.train(tmp_path / "tuned", data, 1, "train.train_iters=0", start) == 0
    tuned = runs.contents(runs.checkpoint_path(tmp_path / "tuned", 0))
    assert runs.differences({name: found[name] for name in weights}, {name: tuned[name] for name in weights}) == []


def test_the_verbs_refuse_in_one_sentence(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    newest = runs.checkpoint_path(copy, 6)
    flip(newest / "state.json")
    oldest, other = runs.checkpoint_path(run, 2), tmp_path / "other" / "iter_0000004"
    shutil.copytree(runs.checkpoint_path(run, 4), other)
    manifest.seal(other, step=4, identity="of another run")
    assert main(["checkpoint", "verify", str(copy)]) == 2
    assert "iter_0000006: DAMAGED: state.json has the sha256" in capsys.readouterr().out
    for tokens, told in (
        (["inspect", str(newest)], "state.json has the sha256"),
        (["inspect", str(run), "--tensor", "nothing"], "has no tensor 'nothing'"),
        (["average", str(copy), "--last", "2", "--output", str(tmp_path / "out")], "state.json has the sha256"),
        (["average", str(run), "--last", "9", "--output", str(tmp_path / "out")], "fewer than --last 9"),
        (["average", str(run), "--output", str(tmp_path / "out")], "two checkpoints or more"),
        (["average", str(run), "--last", "2", "--output", str(tmp_path)], "exists; name another --output"),
        (
            ["average", str(oldest), str(run), "--output", str(tmp_path / "out")],
            "is a run's directory, not a checkpoint",
        ),
        (["average", str(oldest), str(other), "--output", str(tmp_path / "out")], "are of different runs"),
        (["average", str(oldest), f"{run}/../run/checkpoints/iter_0000002", "--output", str(tmp_path / "out")], "once"),
        (["average", str(run), "--last", "2", "--output", "/proc/out"], "/proc/out could not be written (No such file"),
        (["average", str(run), "--last", "2", "--output", str(newest / "state.json" / "out")], "could not be written"),
        (["list", str(tmp_path / "nothing")], "holds no checkpoint"),
        (["list", str(newest)], "is one checkpoint, not a run"),
    ):
        assert main(["checkpoint", *tokens]) == 2
        error = capsys.readouterr().err
        assert told in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", [100, 20_000])
def test_an_average_on_a_full_disk_leaves_nothing(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], limit: int
) -> None:
    """No file may grow beyond ``limit`` bytes: what a full disk does, by the same way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        code = main(["checkpoint", "average", str(run), "--last", "2", "--output", str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert code == 2 and "out could not be written (File too large); nothing is left of it" in error
    assert "Traceback" not in error and list(tmp_path.iterdir()) == []
