"""Damage that must be noticed: 40 times bytes flipped, files cut, missing, renamed, or swapped between runs.

24 cases damage the newest checkpoint of a run, 14 a shard of its corpus; each is put before the verification that a
start of the run begins with. Two whole starts show what the user sees: one goes on from the checkpoint before, one is
refused. Noticed means: of a checkpoint, that a resume would not use it and that the warning names it; of a corpus, that
it is refused.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from megatron_slm.errors import CheckpointError, DataError  # noqa: E402
from megatron_slm.run_data import open_corpus  # noqa: E402
from megatron_slm.train.recovery import newest_whole  # noqa: E402
from megatron_slm.train.run_directory import stored_identity  # noqa: E402
from tests import runs  # noqa: E402
from tests.bench.corpus import prepare_corpus  # noqa: E402
from tests.ranks import RankFailure  # noqa: E402

VOCAB, CHECKPOINT_CASES, SHARD_CASES = 512, 24, 14
LAST, BEFORE = 4, 2
OPTIONS = ("train.eval_iters=0", "log.tensorboard=false", "checkpoint.save_interval=2", f"train.train_iters={LAST}")
OTHER = ("train.seed=2", "model.num_layers=2", "optimizer.lr=1e-3")

Damage = Callable[[Path, Path, random.Random], None]
"""Takes a file, the same file of another run, and where to strike."""


def flip(file: Path, other: Path, where: random.Random) -> None:
    """One bit of one byte."""
    content = bytearray(file.read_bytes())
    content[where.randrange(len(content))] ^= 1 << where.randrange(8)
    file.write_bytes(content)


def cut(file: Path, other: Path, where: random.Random) -> None:
    """The file ends early, perhaps at once."""
    with file.open("r+b") as stream:
        stream.truncate(where.randrange(file.stat().st_size))


def remove(file: Path, other: Path, where: random.Random) -> None:
    """The file is missing."""
    file.unlink()


def rename(file: Path, other: Path, where: random.Random) -> None:
    """The file goes by another name."""
    file.rename(file.with_name(f"{file.name}.bak"))


def swap(file: Path, other: Path, where: random.Random) -> None:
    """The same file of another run lies there."""
    shutil.copyfile(other, file)


def swap_directory(file: Path, other: Path, where: random.Random) -> None:
    """The whole directory is another run's, manifest and all."""
    shutil.rmtree(file.parent)
    shutil.copytree(other.parent, file.parent)


KINDS: dict[str, Damage] = {"flipped": flip, "truncated": cut, "missing": remove, "renamed": rename, "swapped": swap}


def train_two(directory: Path, corpora: tuple[Path, Path]) -> tuple[Path, Path]:
    """Two runs with two checkpoints each, that differ in everything a file of a checkpoint depends on."""
    run, other = directory / "run", directory / "other"
    runs.train(run, corpora[0], 1, *OPTIONS)
    runs.train(other, corpora[1], 1, *OPTIONS, *OTHER)
    return run, other


def notices_checkpoint(run: Path) -> bool:
    """Whether a resume passes over the newest checkpoint, and says why."""
    try:
        found = newest_whole(run / "checkpoints", identity=stored_identity(run))
    except CheckpointError as error:
        return f"iter_{LAST:07d}" in str(error)
    return found is not None and found.state.step == BEFORE and f"iter_{LAST:07d}" in str(found.warning)


def notices_corpus(split: Path) -> bool:
    """Whether opening the split refuses it."""
    try:
        open_corpus(split, verify=True)
    except DataError:
        return True
    return False


def cases(files: list[str], count: int) -> list[tuple[str, str]]:
    """Kinds of damage and the files they hit, in turns."""
    pairs = itertools.product(files, KINDS)
    return [(kind, file) for file, kind in itertools.islice(itertools.cycle(pairs), count)]


def main() -> None:
    """Print what was noticed of each kind and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the same cases: they take seconds")
    parser.parse_args()
    directory, where = Path(tempfile.mkdtemp(prefix="mslm-corruption-")), random.Random(1234)
    results: dict[str, list[bool]] = {}
    try:
        for name in ("first", "second"):
            (directory / name).mkdir()
        corpora = (
            prepare_corpus(directory / "first", VOCAB, max_characters=1_000_000),
            prepare_corpus(directory / "second", VOCAB, max_characters=1_200_000),
        )
        run, other = train_two(directory, corpora)
        for number, (kind, name) in enumerate(checkpoint_cases(run)):
            copy = Path(shutil.copytree(run, directory / f"case{number}"))
            strike = swap_directory if kind == "directory swapped" else KINDS[kind]
            strike(*(runs.checkpoint_path(path, LAST) / name for path in (copy, other)), where)
            results.setdefault(f"checkpoint, {kind}", []).append(notices_checkpoint(copy))
            shutil.rmtree(copy)
        for kind, name in cases(corpus_files(corpora[0]), SHARD_CASES):
            copy = Path(shutil.copytree(corpora[0], directory / "corpus"))
            KINDS[kind](copy / name, corpora[1] / name, where)
            results.setdefault(f"corpus, {kind}", []).append(notices_corpus((copy / name).parent))
            shutil.rmtree(copy)
        results["whole start"] = [resumes_before(run, corpora[0], where), refuses_shard(other, corpora[1], where)]
    finally:
        shutil.rmtree(directory)
    report(results)


def checkpoint_cases(run: Path) -> list[tuple[str, str]]:
    """Every kind on every sort of file, and the directory of another run in the place of this one's."""
    payload = next(runs.checkpoint_path(run, LAST).glob("*.distcp")).name
    files = [payload, ".metadata", "common.pt", "state.json", "manifest.json"]
    return [*cases(files, CHECKPOINT_CASES - 1), ("directory swapped", "manifest.json")]


def corpus_files(corpus: Path) -> list[str]:
    """A shard of each split, and the training split's index."""
    shards = [next((corpus / split).glob("*.arrow")) for split in ("train", "valid")]
    return [*(str(shard.relative_to(corpus)) for shard in shards), "train/index.json"]


def resumes_before(run: Path, corpus: Path, where: random.Random) -> bool:
    """A start over a flipped bit goes on from the checkpoint before, and its log says so."""
    flip(next(runs.checkpoint_path(run, LAST).glob("*.distcp")), run, where)
    runs.train(run, corpus, 1, *OPTIONS)
    log = (run / "log.txt").read_text()
    return f"Used instead: iter_{BEFORE:07d}" in log and f"iter_{BEFORE:07d} at step {BEFORE}" in log


def refuses_shard(run: Path, corpus: Path, where: random.Random) -> bool:
    """A start over a flipped bit in a shard ends with exit code 2 and no traceback."""
    flip(corpus / corpus_files(corpus)[0], run, where)
    try:
        runs.train(run, corpus, 1, *OPTIONS, *OTHER, "train.train_iters=6")
    except RankFailure as failure:
        return failure.code == 2 and "Traceback" not in str(failure)
    return False


def report(results: dict[str, list[bool]]) -> None:
    """The table, and the line of JSON."""
    print(f"{'damage':<32} {'cases':>5} {'noticed':>8}")
    for kind, noticed in results.items():
        print(f"{kind:<32} {len(noticed):>5} {sum(noticed):>8}")
    every = [noticed for kind in results.values() for noticed in kind]
    share = sum(every) / len(every)
    print(json.dumps({"benchmark": "corruption", "detected_share": share, "bar": "1.0", "cases": len(every)}))


if __name__ == "__main__":
    main()
