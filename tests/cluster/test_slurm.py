"""``launch/slurm.sh`` on a real Slurm: jobs that train, are preempted, lose a node, or are refused."""

from __future__ import annotations

from pathlib import Path

from tests import runs, slurm
from tests.slurm import SCRIPT, TWO_BY_TWO, Lab, require_equal, steps, wait_until


def test_two_nodes_train_and_every_rank_and_node_has_its_log(lab: Lab, uninterrupted: Path) -> None:
    assert sorted(runs.losses(uninterrupted)) == list(range(1, 41))
    (folder,) = (uninterrupted / "slurm").iterdir()
    (rank,) = folder.glob("rank-*.log")
    assert rank.name == "rank-3.log" and "iteration       40/      40" in rank.read_text()
    (node,) = folder.glob("node-*.log")
    assert all(line.startswith("3: ") for line in node.read_text().splitlines())
    out = (uninterrupted.parents[1] / f"slurm-{folder.name.partition('.')[0]}.out").read_text()
    assert "3:  [" in out and "# where rank 0 is" in out


def test_preempted_job_is_requeued_and_ends_as_if_it_had_not_been(lab: Lab, config: Path, uninterrupted: Path) -> None:
    run = config.parent / "runs" / "preempted"
    job = lab.submitted(config, run.name)
    wait_until("the first steps", lambda: steps(run) >= 3, lambda: lab.said(config, job))
    assert lab.ask("scancel", "--signal=USR1", "--batch", job).returncode == 0
    assert lab.ended(job) == "COMPLETED", lab.said(config, job)
    said = lab.said(config, job)
    assert "slurm.sh: 0 s: stopped after a clean save" in said and "resumed runs/preempted/checkpoints" in said
    assert "Restart: 1" in (run / "progress.txt").read_text()
    assert {path.name for path in (run / "slurm").iterdir()} == {f"{job}.0", f"{job}.1"}, "the same job, twice"
    require_equal(run, uninterrupted)


def test_job_comes_back_when_a_node_dies(lab: Lab, config: Path, uninterrupted: Path) -> None:
    run = config.parent / "runs" / "bereft"
    job = lab.submitted(config, run.name)
    wait_until("a checkpoint and a step more", lambda: steps(run) >= 6, lambda: lab.said(config, job))
    nodes = lab.ask("squeue", "--noheader", f"--jobs={job}", "--format=%N").stdout.strip()
    lost = lab.ask("scontrol", "show", "hostnames", nodes).stdout.split()[-1]
    lab.kill_node(lost)
    try:
        assert lab.ended(job) == "COMPLETED", lab.said(config, job)
    finally:
        slurm.lab_script("node", lab.directory, lost)
    assert "resumed runs/bereft/checkpoints/iter_" in lab.said(config, job)
    assert "Restart: 1" in (run / "progress.txt").read_text()
    require_equal(run, uninterrupted)


def test_a_dead_rank_brings_the_job_back_to_the_queue(lab: Lab, config: Path) -> None:
    run = config.parent / "runs" / "injured"
    job = lab.submitted(config, run.name, "train.train_iters=12")
    wait_until("a checkpoint and a step more", lambda: steps(run) >= 6, lambda: lab.said(config, job))
    lab.kill_rank(job, 1)
    assert lab.ended(job) == "COMPLETED", lab.said(config, job)
    said = lab.said(config, job)
    assert "slurm.sh: 1 s: restart 1 of 10 from the checkpoint of step 5" in said, said
    assert "resumed runs/injured/checkpoints/iter_0000005 at step 5" in said
    assert [end["code"] for end in runs.records(run, "restarts.jsonl")] == [137], "killed by SIGKILL"


def test_a_run_whose_budget_is_used_up_is_saved_and_left(lab: Lab, config: Path) -> None:
    job = lab.submitted(config, "thrifty", MSLM_BUDGET_NODE_HOURS="0.0001")
    assert lab.ended(job) == "FAILED"
    said = lab.said(config, job)
    assert "saved runs/thrifty/checkpoints/iter_" in said and "not queued again: the budget is used up" in said


def test_what_cannot_start_or_fit_never_reaches_the_queue(lab: Lab, config: Path) -> None:
    before = lab.ask("squeue", "--noheader", "--states=all", "--format=%i").stdout
    wide = ("model.hidden_size=8192", "model.num_layers=32", "model.num_attention_heads=64", "model.num_query_groups=8")
    cases = {
        "does not fit": (*TWO_BY_TWO, config.name, *wide),
        "parallel.world_size = 8": (*TWO_BY_TWO, config.name, "parallel.world_size=8"),
        "hidden_size": (*TWO_BY_TWO, config.name, "model.hidden_size=33"),
        "give --gpus-per-node": (*TWO_BY_TWO, config.name, "parallel.device=cuda"),
        "No CONFIG": ("--nodes=2",),
    }
    for said, tokens in cases.items():
        done = lab.ask(str(SCRIPT), *tokens, cwd=config.parent)
        assert done.returncode == 2 and said in done.stderr, f"{said}: {done.stderr}"
        assert "Traceback" not in done.stderr
    assert lab.ask("squeue", "--noheader", "--states=all", "--format=%i").stdout == before


def test_an_array_trains_one_run_for_every_seed(lab: Lab, config: Path) -> None:
    options = ("--nodes=1", "--ntasks-per-node=1", "--array=0-1")
    one = ("parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=1", "train.train_iters=2")
    done = lab.ask(str(SCRIPT), *options, config.name, "name=seeds", *one, cwd=config.parent)
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[-1]
    assert lab.ended(job) == "COMPLETED", [path.read_text() for path in config.parent.glob(f"slurm-{job}_*.out")]
    first, second = (runs.losses(config.parent / "runs" / f"seeds-{index}") for index in range(2))
    assert len(first) == len(second) == 2 and first != second, "two seeds, two losses"
