"""Makes what docs/divergence.md shows: ``python tools/divergence_walk.py``, some minutes on two cores.

Two small runs of one configuration are trained on four CPU ranks, the second by a copy of the program in which three
lines differ. ``mslm replay`` then finds the line. The outputs go into the page, and the losses into its picture.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "divergence.md"
PICTURE = ROOT / "docs" / "images" / "divergence.png"
PROGRAM = ("megatron_slm", "parallel", "kernels", "launch")
TEXTS = ("argparse.py", "ast.py", "calendar.py", "enum.py", "inspect.py", "typing.py")
CONFIG = """\
model:
  num_layers: 2
  hidden_size: 64
  num_attention_heads: 4
  num_query_groups: 2
  seq_length: 64
parallel:
  device: cpu
  world_size: 4
  tensor_model_parallel_size: 2    # and two data-parallel replicas
train:
  train_iters: 120
  global_batch_size: 8
  micro_batch_size: 2
  eval_iters: 0
optimizer:
  lr: 0.005
schedule:
  lr_decay_style: constant
data:
  data_path: corpus
checkpoint:
  save_interval: 10
replay:
  level: layer
"""
FIXED_STEPS = 40
WINDOW = 9
VISIBLE = 0.05
"""Share of the loss from which on two curves are told apart by eye."""


class Change(NamedTuple):
    """One line of the program as it is and as the colleague has it."""

    file: str
    before: str
    after: str


GUILTY = Change(
    "parallel/vocab_loss.py",
    "    exponentials = logits.exp_()\n",
    "    exponentials = logits.clamp_(min=-8.0).exp_()  # in bf16 smaller terms add nothing to 1\n",
)
CHANGES = (
    Change("parallel/vocab_loss.py", "    logits -= maximum[:, None]\n", "    logits -= maximum.unsqueeze(1)\n"),
    GUILTY,
    Change(
        "parallel/attention.py",
        "softmax_scale or 1.0 / math.sqrt(k_channels or config.kv_channels)",
        "softmax_scale or math.sqrt(1.0 / (k_channels or config.kv_channels))",
    ),
)
Losses = dict[int, float]


class Walk:
    """The way of the page, command by command, in one folder.

    Attributes:
        blocks: what the page shows, by the names of its marks.
    """

    def __init__(self, folder: Path) -> None:
        """Nothing is done yet."""
        self.folder = folder
        self.blocks: dict[str, str] = {}

    def prepare(self) -> None:
        """Two copies of the program, text and configuration."""
        for name in ("mine", "theirs"):
            for room in PROGRAM:
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / room, self.folder / name / room, symlinks=True, ignore=ignored)
        for change in CHANGES:
            apply(change, self.folder / "theirs")
        library = Path(sysconfig.get_path("stdlib"))
        (self.folder / "text.txt").write_text("\n\n".join((library / name).read_text() for name in TEXTS))
        (self.folder / "run.yaml").write_text(CONFIG)
        self.blocks["config"] = CONFIG.rstrip("\n")
        self.mslm("mine", "data prepare text.txt --output corpus --vocab-size 512")

    def train(self) -> tuple[Losses, Losses]:
        """Both runs; the losses of each."""
        commands = [self.mslm(name, f"train run.yaml --name {name}")[0] for name in ("mine", "theirs")]
        self.blocks["train"] = "\n".join(commands)
        return losses(self.folder / "runs" / "mine"), losses(self.folder / "runs" / "theirs")

    def find(self) -> tuple[int, str]:
        """Compare, bisect and look; (the first step that differs, rank)."""
        self.blocks["diff"] = self.shown("mine", "replay diff runs/mine runs/theirs")
        self.blocks["bisect"] = self.shown("mine", "replay bisect runs/mine runs/theirs --code mine theirs")
        found = re.search(r"^first difference: step (\d+), rank (\d+)", self.blocks["bisect"], re.MULTILINE)
        if found is None:
            raise SystemExit(f"The runs did not part:\n{self.blocks['bisect']}")
        step, rank = int(found[1]), found[2]
        self.blocks["step"] = self.shown("theirs", f"replay step runs/theirs {step} --capture op")
        show = f"replay show runs/theirs-replay/step-{step:07d} --step {step} --rank {rank}"
        command, output = self.mslm("theirs", show)
        chosen = [line for line in output.splitlines() if "phase" in line or "in _losses" in line]
        self.blocks["show"] = "\n".join([f"{command} | grep 'phase\\|in _losses' | head -15", *chosen[:15]])
        return step, rank

    def mend(self) -> None:
        """The colleague's program without the line, for as long as it takes."""
        apply(GUILTY._replace(before=GUILTY.after, after=GUILTY.before), self.folder / "theirs")
        train, _ = self.mslm("theirs", f"train run.yaml --name mended train.exit_interval={FIXED_STEPS}")
        self.blocks["mended"] = f"{train}\n{self.shown('mine', 'replay diff runs/mine runs/mended')}"

    def shown(self, code: str, words: str) -> str:
        """A command and what it prints."""
        return "\n".join(self.mslm(code, words)).rstrip("\n")

    def mslm(self, code: str, words: str) -> tuple[str, str]:
        """Run one verb of one of the programs; (the line as it is typed, what it prints)."""
        environment = {**os.environ, "PYTHONPATH": code, "OMP_NUM_THREADS": "1"}
        typed = f"$ PYTHONPATH={code} mslm {words}"
        print(typed, flush=True)
        done = subprocess.run(
            [sys.executable, "-c", "from megatron_slm import cli; raise SystemExit(cli.main())", *words.split()],
            cwd=self.folder,
            env={**environment, "PYTHONPATH": str(self.folder / code)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode not in (0, 1, 75) or (done.returncode == 1 and not done.stdout):
            raise SystemExit(f"{done.stdout}{done.stderr}\nended with exit code {done.returncode}")
        return typed, done.stdout.replace(f"{self.folder}/", "")


def apply(change: Change, program: Path) -> None:
    """Change a program's one line.

    Raises:
        SystemExit: it is not there, or several times.
    """
    file = program / change.file
    text = file.read_text(encoding="utf-8")
    if text.count(change.before) != 1:
        raise SystemExit(f"{change.file} holds {change.before!r} {text.count(change.before)} times, not once.")
    file.write_text(text.replace(change.before, change.after), encoding="utf-8")


def losses(run: Path) -> Losses:
    """The logged loss of every step."""
    records = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {record["step"]: record["lm_loss"] for record in records}


def milestones(first: Losses, second: Losses, step: int) -> str:
    """When the bits, the logged loss and the eye part."""
    apart = {at: abs(first[at] - second[at]) for at in first}
    logged = next((at for at, size in apart.items() if size > 0.0), None)
    seen = next((at for at, size in apart.items() if size > VISIBLE * first[at]), None)
    rows = [
        ("a recorded tensor differs", step),
        ("the logged loss differs", logged),
        (f"by more than {VISIBLE:.0%}", seen),
    ]
    return "\n".join(
        f"{what:<28} step {at:>3}   loss {first[at]:.9f} and {second[at]:.9f}" for what, at in rows if at is not None
    )


def means(run: Losses) -> tuple[list[int], list[float]]:
    """(steps, means of the ``WINDOW`` losses around them)."""
    values = list(run.values())
    sums = [sum(values[at : at + WINDOW]) / WINDOW for at in range(len(values) - WINDOW + 1)]
    return list(run)[WINDOW // 2 :][: len(sums)], sums


def draw(first: Losses, second: Losses, step: int, named: str) -> Figure:
    """The losses above, how far they are apart below, and where ``diff`` and ``bisect`` have put the beginning."""
    figure = Figure(figsize=(9.0, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for run, name, color in ((first, "mine", "#1f77b4"), (second, "theirs", "#d62728")):
        above.plot(list(run), list(run.values()), color=color, alpha=0.35, linewidth=0.8)
        above.plot(*means(run), color=color, linewidth=1.8, label=f"{name}, mean of {WINDOW} steps")
    above.set_ylabel("loss (nats per token)")
    above.legend(frameon=False, loc="upper right")
    apart = {at: abs(first[at] - second[at]) for at in first if first[at] != second[at]}
    below.semilogy(list(apart), list(apart.values()), ".-", color="#444444", linewidth=0.8, markersize=4)
    below.set_ylabel("|mine - theirs|")
    below.set_xlabel("step")
    seen = next((at for at, size in apart.items() if size > VISIBLE * first[at]), None)
    for axes in (above, below):
        _tidy(axes)
        axes.axvline(step, color="#2ca02c", linewidth=1.2)
        if seen is not None:
            axes.axvline(seen, color="#888888", linewidth=1.0, linestyle="--")
    above.annotate(
        f"mslm replay diff: step {step}\nmslm replay bisect: {named}",
        (step, max(first.values())), xytext=(8, -4), textcoords="offset points", va="top", color="#2ca02c",
    )  # fmt: skip
    if seen is not None:
        above.annotate(
            f"the eye: {VISIBLE:.0%} apart", (seen, max(first.values())),
            xytext=(6, -48), textcoords="offset points", va="top", color="#666666",
        )  # fmt: skip
    return figure


def filled(page: str, blocks: Mapping[str, str]) -> str:
    """The page with every marked block replaced.

    Raises:
        SystemExit: page and walk do not have the same blocks.
    """
    marks = set(re.findall(MARK, page))
    if marks != set(blocks):
        raise SystemExit(f"{PAGE.name} has marks for {sorted(marks)}; the walk has made {sorted(blocks)}.")
    for name, block in blocks.items():
        before, fence, rest = re.split(rf"(<!-- walk: {name} -->\n```\w*\n)", page, maxsplit=1)
        page = before + fence + block + "\n```" + rest.partition("```")[2]
    return page


MARK = r"<!-- walk: (\w+) -->\n```"


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines["top"].set_visible(False)
    axes.spines["right"].set_visible(False)
    axes.margins(x=0.01)


def main() -> int:
    """Walk, then write page and picture."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--work", type=Path, help="empty directory that keeps the runs; default one that is removed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.work or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        walk = Walk(folder)
        walk.prepare()
        first, second = walk.train()
        step, _ = walk.find()
        walk.mend()
    walk.blocks["curves"] = milestones(first, second, step)
    named = re.search(r"second run: (\S+)", walk.blocks["bisect"])
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), walk.blocks), encoding="utf-8")
    PICTURE.parent.mkdir(exist_ok=True)
    draw(first, second, step, named[1] if named else "?").savefig(PICTURE, dpi=110)
    print(f"wrote {PAGE} and {PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
