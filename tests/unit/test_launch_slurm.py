"""What ``launch/slurm.sh`` is told, without a cluster: allocations, variables, the ranks' command, sweeps, budgets."""

from __future__ import annotations

import dataclasses
import json
import socket
from pathlib import Path

import pytest

from megatron_slm.commands import slurm_check, slurm_job
from megatron_slm.config.load import load
from megatron_slm.errors import ConfigError, LaunchError
from megatron_slm.launch import allocation
from megatron_slm.launch.allocation import Allocation, minutes_of, of_environment, of_options
from megatron_slm.launch.job_environment import job_variables
from megatron_slm.launch.step import container, meeting_port, step_command
from megatron_slm.parallel import device
from megatron_slm.train.console import restarts_text

CPU = Allocation(nodes=2, ranks_per_node=2, memory_mb=4000)
GPU = Allocation(nodes=2, ranks_per_node=8, gpus_per_node=8, gpu="h100")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--nodes=2 --ntasks-per-node=4 --mem=16G", Allocation(2, 4, memory_mb=16384)),
        ("-N 2 -n 8 --mem 4000 --time 10", Allocation(2, 4, memory_mb=4000)),
        ("--nodes 2 --gpus-per-node=h100:8 --mem=1T", Allocation(2, 8, 8, "h100", 1048576)),
        ("-N2 --gres=shard:1,gpu:4 --mem=9M", Allocation(2, 4, 4, None, 9)),
        ("--mem=9M", Allocation(1, 1, memory_mb=9)),
    ],
)
def test_options_of_sbatch_say_what_the_job_will_have(options: str, expected: Allocation) -> None:
    assert of_options(options.split()) == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--nodes=2-4 --mem=1G", "--nodes=2-4: give one number"),
        ("--nodes=2 --ntasks=3 --mem=1G", "3 tasks on 2 nodes"),
        ("--gpus-per-node=8 --ntasks-per-node=4 --mem=1G", "8 GPUs and 4 tasks on a node"),
        ("--nodes=2 --ntasks-per-node=many", "options of sbatch"),
        ("--mem=much", "--mem=much is no size"),
    ],
)
def test_what_leaves_the_ranks_open_is_refused(options: str, said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        of_options(options.split())


def test_the_job_itself_reads_the_same_from_its_variables() -> None:
    environ = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "vn[1-2]", "SLURM_MEM_PER_NODE": "4000"}
    assert of_environment({**environ, "SLURM_NTASKS": "4"}) == CPU
    assert of_environment({**environ, "SLURM_NTASKS_PER_NODE": "2"}) == CPU
    own = {"SLURM_NTASKS": "16", "SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS_PER_NODE": "h100:8"}
    assert of_environment({**environ, **own}) == Allocation(2, 8, 8, "h100", 4000)
    with pytest.raises(LaunchError, match="--ntasks-per-node=8"):
        of_environment({**environ, "SLURM_GPUS_ON_NODE": "8"})


def test_slurms_durations() -> None:
    cases = {"1-02:03:30": 1563.5, "10:00": 10.0, "1:00:00": 60.0, "UNLIMITED": None, "INVALID": None, "": None}
    assert {text: minutes_of(text) for text in cases} == cases


def test_a_machine_without_slurm_is_named() -> None:
    with pytest.raises(LaunchError, match="no no-such-program on PATH"):
        allocation.asked(["no-such-program"])


def names(overrides: list[str], device: str, **environ: str) -> set[str]:
    found = job_variables(load(None, overrides).config, device, 4, environ)
    assert all(variable.reason and "\n" not in variable.reason for variable in found)
    return {variable.name for variable in found}


def test_variables_follow_from_the_configuration_and_never_replace_one() -> None:
    assert names([], "cpu") == {"OMP_NUM_THREADS", "PYTHONUNBUFFERED"}
    assert names([], "cpu", OMP_NUM_THREADS="2") == {"PYTHONUNBUFFERED"}
    plain = names(["parallel.overlap_grad_reduce=false"], "cuda")
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in plain and "NVTE_FWD_LAYERNORM_SM_MARGIN" not in plain
    assert {"PYTORCH_CUDA_ALLOC_CONF", "NCCL_DEBUG"} <= plain
    assert "CUDA_DEVICE_MAX_CONNECTIONS" in names(["parallel.tensor_model_parallel_size=2"], "cuda")
    assert "NVTE_BWD_LAYERNORM_SM_MARGIN" in names([], "cuda")


def test_a_deterministic_job_is_given_every_switch_that_the_doctor_asks_for() -> None:
    device.preload("cpu")
    from megatron_slm.doctor import determinism

    config = load(None, ["train.deterministic=true", "parallel.tensor_model_parallel_size=2"]).config
    given = {one.name: one.value for one in job_variables(config, "cuda", 1, {})}

    def active(environ: dict[str, str]) -> list[str]:
        target = determinism.target_of(config, "cuda", 2, environ)
        return [one.switch for one in determinism.active(dataclasses.replace(target, transformer_engine=True))]

    assert active(given) == []
    switches = (
        "CUBLAS_WORKSPACE_CONFIG",
        "NCCL_ALGO",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
        "TORCHINDUCTOR_DETERMINISTIC",
    )
    for name in switches:
        without = {other: value for other, value in given.items() if other != name}
        assert active(without) == [f"{name}={given[name]}"]


def test_the_command_starts_one_process_for_each_rank() -> None:
    command = step_command(CPU, ["mslm", "train"], {"SLURM_CPUS_PER_TASK": "3"})
    assert command[:2] == ["srun", "--label"] and command[-2:] == ["mslm", "train"]
    assert {"--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=3"} <= set(command)
    assert "--gpu-bind=none" in step_command(GPU, ["mslm"], {})


def test_images_of_pyxis_and_apptainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"MSLM_CONTAINER": "nvcr.io/nvidia/pytorch:26.01-py3", "MSLM_CONTAINER_MOUNTS": "/data,/a:/b"}
    pyxis = step_command(GPU, ["mslm"], given)
    assert f"--container-mounts={tmp_path}:{tmp_path},/data:/data,/a:/b" in pyxis and pyxis[-1] == "mslm"
    runner = tmp_path / "apptainer"
    runner.write_text("#!/bin/sh\n")
    runner.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert container("it.sif", "/data", ["mslm"], gpus=True) == (
        [],
        ["apptainer", "exec", "--nv", "--bind", str(tmp_path), "--bind", "/data", "--pwd", str(tmp_path), "it.sif"]
        + ["mslm"],
    )
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match="apptainer or singularity"):
        container("it.sif", "", ["mslm"], gpus=True)


def test_every_restart_meets_at_another_port_and_a_taken_one_is_passed_over() -> None:
    first, second = (meeting_port("127.0.0.1", 4711, restarts) for restarts in (0, 1))
    assert first != second
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", first))
        listening.listen()
        assert meeting_port("127.0.0.1", 4711, 0) != first


def config_file(folder: Path) -> str:
    (folder / "own.yaml").write_text("train:\n  seed: 10\n")
    return str(folder / "own.yaml")


def test_an_array_is_a_seed_or_a_line_of_the_sweep_for_every_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_file(tmp_path)
    alone = slurm_job.job_of([config, "name=kept", "--train-iters", "7"], None)
    assert (alone.name, alone.values) == ("kept", {"name": "kept", "train.train_iters": "7"})
    seeded = slurm_job.job_of([config], 3)
    assert (seeded.name, seeded.resolved.config.train.seed) == ("own-3", 13)
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("# rates\noptimizer.lr=1e-3\n\noptimizer.lr=1e-4 train.seed=1\n")
    monkeypatch.setenv("MSLM_SWEEP", str(sweep))
    second = slurm_job.job_of([config, "name=kept", "optimizer.lr=5"], 1)
    assert (second.name, second.resolved.config.optimizer.lr, second.resolved.config.train.seed) == ("kept-1", 1e-4, 1)
    assert second.tokens()[0] == config and "name=kept-1" in second.tokens()
    assert [job.name for job in slurm_job.jobs_of([config], [0, 1])] == ["own-0", "own-1"]
    with pytest.raises(ConfigError, match="2 lines, but the array asks for line 2"):
        slurm_job.job_of([config], 2)
    with pytest.raises(ConfigError, match="give --array=0-1"):
        slurm_job.jobs_of([config], None)
    with pytest.raises(ConfigError, match="2 lines, but the array asks for line 4"):
        slurm_job.jobs_of([config], slurm_job.array_indices(["--nodes=1", "--array=0-4:4%2"]))
    sweep.write_text("optimizer.lr='1e-3\ntrain.sed=1\n")
    with pytest.raises(ConfigError, match=r"sweep.txt, line 0 .*cannot be read: No closing quotation"):
        slurm_job.job_of([config], 0)
    with pytest.raises(ConfigError, match=r"sweep.txt, line 1 .*train.sed"):
        slurm_job.job_of([config], 1)
    sweep.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="has no line of values"):
        slurm_job.job_of([config], 0)


def test_indices_of_an_array() -> None:
    assert slurm_job.array_indices(["-a", "1,3-5"]) == [1, 3, 4, 5]
    assert slurm_job.array_indices(["-N", "2"]) is None
    with pytest.raises(ConfigError, match="no list of indices"):
        slurm_job.array_indices(["--array=x"])


@pytest.mark.parametrize("option", ["--gpus=8", "-G8", "--gpus-per-task=1", "--mem-per-cpu=100M"])
def test_options_that_do_not_say_what_a_node_gives_are_refused(option: str) -> None:
    with pytest.raises(LaunchError, match="does not say what one node gives"):
        of_options(["--nodes=2", option])


def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be made .*log.runs_dir"):
        slurm_job.make(tmp_path / "file" / "runs")


def test_what_a_job_cannot_be_given(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No CONFIG"):
        slurm_job.job_of(["train.seed=1"], None)
    with pytest.raises(ConfigError, match="--fresh would begin anew"):
        slurm_job.job_of([config_file(tmp_path), "--fresh"], None)
    with pytest.raises(ConfigError, match="hiden_size"):
        slurm_job.job_of([config_file(tmp_path), "model.hiden_size=3"], None)


def test_options_stand_before_the_file_and_values_behind_it() -> None:
    tokens = ["--nodes", "2", "--export=A=x.yaml", "own.yaml", "train.seed=1"]
    assert slurm_job.split(tokens) == (tokens[:3], tokens[3:])


def test_the_budget_is_what_the_starts_have_used(tmp_path: Path) -> None:
    assert slurm_job.budget_left(tmp_path, 4, {}) is None
    assert slurm_job.budget_left(tmp_path, 4, {"MSLM_BUDGET_NODE_HOURS": "3"}) == 3.0
    start = {"started": 1000.0, "first_step": 0, "last_step": 5, "last_seen": 1900.0}
    (tmp_path / "attempts.jsonl").write_text(f"{json.dumps(start)}\n{json.dumps(start)}\n")
    assert slurm_job.budget_left(tmp_path, 4, {"MSLM_BUDGET_NODE_HOURS": "3"}) == 1.0
    with pytest.raises(ConfigError, match="MSLM_BUDGET_NODE_HOURS=much is no number"):
        slurm_job.budget_left(tmp_path, 4, {"MSLM_BUDGET_NODE_HOURS": "much"})


def test_contradictions_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    """Before torch is imported: the memory and the roles have their test on a cluster."""
    wrong = slurm_job.job_of([config_file(tmp_path), "parallel.world_size=8", "parallel.device=cuda"], None)
    with pytest.raises(ConfigError, match=r"parallel.world_size = 8(.|\n)*parallel.device = cuda"):
        slurm_check.refusal([wrong], CPU)


def test_restarts_are_counted_for_slurm_and_torchrun() -> None:
    assert restarts_text({}) == restarts_text({"TORCHELASTIC_RESTART_COUNT": "0"}) == ""
    assert restarts_text({"TORCHELASTIC_RESTART_COUNT": "2"}) == "\tRestart: 2"
    assert restarts_text({"SLURM_RESTART_COUNT": "1", "TORCHELASTIC_RESTART_COUNT": "0"}) == "\tRestart: 1"
