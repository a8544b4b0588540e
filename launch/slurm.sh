#!/usr/bin/env bash
# Trains CONFIG on a Slurm cluster, one process for each rank, until it is done: over time limits, preemptions and dead nodes.
#
#   launch/slurm.sh [options of sbatch] CONFIG [a.b=c ...]    on a login node: check, then submit (or refuse: exit code 2)
#   sbatch [options of sbatch] launch/slurm.sh CONFIG [a.b=c ...]    the same check as the first thing of the job
#   bash launch/slurm.sh CONFIG [a.b=c ...]                   inside salloc
#
#   launch/slurm.sh --nodes=2 --gpus-per-node=8 --time=1-0 --partition=gpu config.yaml
#   launch/slurm.sh --nodes=2 --ntasks-per-node=2 config.yaml parallel.tensor_model_parallel_size=2    CPU ranks
#   launch/slurm.sh --nodes=1 --gpus-per-node=8 --array=0-4 config.yaml    five seeds, in runs NAME-0 ... NAME-4
#
# A rank is a task: as many as GPUs on a node, or --ntasks-per-node. Variables:
#   MSLM                   the program mslm, if it is neither on PATH nor in .venv/bin here or beside launch/
#   MSLM_GPU               h100-80gb ... or a cluster's YAML file (mslm memory --help): does the job fit?
#   MSLM_SWEEP             a file; line N (from 0) holds the values a.b=c of job N of --array
#   MSLM_BUDGET_NODE_HOURS what the run may use over all its starts; then it is saved and not queued again
#   MSLM_CONTAINER         an image for pyxis, or a file .sif for apptainer; MSLM_CONTAINER_MOUNTS=PATH[:INSIDE],...
#   and every variable of NCCL, CUDA, torch: what is set is not changed
#
# Output: slurm-JOB.out, every line with its rank; the same by rank and by node in runs/NAME/slurm/JOB.RESTART/.
# Two minutes before the time limit the step is finished and saved, and the job goes back to the queue under its own
# number; so it does when a rank or node has died, unless that happens again and again (mslm restart --help).
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

say() { printf 'slurm.sh: %s\n' "$*" >&2; }

# sbatch copies this file to a folder of its own; Slurm knows where it came from.
find_mslm() {
    local script=$0 place
    if [ -n "${MSLM:-}" ]; then echo "$MSLM" && return; fi
    command -v mslm && return
    if [ -n "${SLURM_JOB_ID:-}" ] && [ ! -x "$(dirname "$script")/../.venv/bin/mslm" ]; then
        script=$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* Command=\([^ ]*\).*/\1/p')
    fi
    for place in "$(dirname "$(readlink -f "$script")")/.." "${SLURM_SUBMIT_DIR:-.}"; do
        if [ -x "$place/.venv/bin/mslm" ]; then
            echo "$(cd "$place" && pwd)/.venv/bin/mslm" && return
        fi
    done
    say "there is no mslm: activate its environment, or set MSLM to the program"
    exit 2
}

# Every line to the job's output, to its rank's file and to its node's. It must hear no signal: srun's ranks still speak.
spread() {
    local nodes line rank
    trap '' TERM INT USR1
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    while IFS= read -r line; do
        printf '%s\n' "$line"
        [[ $line =~ ^\ *([0-9]+):\ (.*) ]] || continue
        rank=${BASH_REMATCH[1]}
        # A full disk or a folder that has gone costs these files, not the job's output.
        { printf '%s\n' "${BASH_REMATCH[2]}" >> "$MSLM_JOB_FOLDER/rank-$rank.log"; } 2> /dev/null || true
        { printf '%s\n' "$line" >> "$MSLM_JOB_FOLDER/node-${nodes[rank / ranks_per_node]}.log"; } 2> /dev/null || true
    done
}

# srun hands USR1 on to every rank. A signal ends `wait` early, and without a wait the trap would come after the step.
run_step() {
    local code out spreading
    exec {out}> >(spread)
    spreading=$!
    "${step[@]}" >&"$out" 2>&1 < /dev/null &
    srun=$!
    exec {out}>&-
    while :; do
        signalled=0
        code=0
        wait "$srun" || code=$?
        [ "$signalled" = 1 ] || break
    done
    # Its last lines; a signal that comes now has nobody to tell.
    wait "$spreading" || true
    return "$code"
}

# shellcheck disable=SC2317  # called by trap
on_usr1() {
    signalled=1
    asked=(--asked)
    say "USR1: the ranks finish their step, save and stop"
    [ -z "$srun" ] || kill -USR1 "$srun" 2> /dev/null || true
}

# Slurm has sent it to the ranks too: a requeue from outside, scancel, or the time limit. None of them is ours to answer.
# shellcheck disable=SC2317  # called by trap
on_term() {
    signalled=1
    ending=1
}

requeue() {
    if scontrol requeue "$job"; then
        # Slurm's own pause after a requeue (two minutes, as a rule) is shorter than this.
        [ "$1" -le 120 ] || scontrol update "JobId=$job" "StartTime=now+$1seconds" || true
    else
        say "the job cannot be queued again: start the same command once more, and it goes on from its last checkpoint"
    fi
}

case ${1:--h} in
    -h | --help) sed -n '/^#SBATCH/,$d; 2,$s/^# \{0,1\}//p' "$0" && exit 0 ;;
esac
MSLM=$(find_mslm)
export MSLM
if [ -z "${SLURM_JOB_ID:-}" ]; then
    exec "$MSLM" slurm submit "$(readlink -f "$0")" "$@"
fi

srun='' signalled=0 ending=0 asked=()
trap on_usr1 USR1
trap on_term TERM
# One job of an array: its plain number can be that of the whole array.
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
MSLM_STARTED=$(date +%s)
export MSLM_STARTED
lines=$("$MSLM" slurm prepare "$@") || exit $?
printf '%s\n' "$lines"
run='' ranks_per_node='' step=()
eval "$lines"

code=75
if [ ${#asked[@]} = 0 ]; then
    code=0
    run_step || code=$?
fi
if [ "$ending" = 1 ] && [ "$code" != 75 ]; then
    # Perhaps a dead node: the next start finds no word of this one's end, and counts it.
    say "ended from outside, the ranks with exit code $code"
    exit "$code"
fi
echo "$code" > "$MSLM_JOB_FOLDER/ended" || say "$MSLM_JOB_FOLDER cannot be written any more: this start is counted as a failure"
if [ "$ending" = 1 ] || [ "$code" = 0 ] || [ "$code" = 2 ]; then exit "$code"; fi
if decision=$("$MSLM" slurm ended "$run" --code "$code" "${asked[@]}"); then
    say "$decision"
    requeue "${decision%% *}"
else
    say "not queued again: $decision"
fi
exit "$code"
