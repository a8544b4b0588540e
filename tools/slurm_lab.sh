#!/usr/bin/env bash
# A real Slurm of several nodes on this machine, to try launch/slurm.sh on a laptop (Debian's slurm-wlm and munge, root):
#   tools/slurm_lab.sh up DIRECTORY [NODES, default 2] [PID]    then: export SLURM_CONF=DIRECTORY/slurm.conf
#   tools/slurm_lab.sh node DIRECTORY NAME                start the slurmd of a node again, after it was killed
#   tools/slurm_lab.sh down DIRECTORY                     end the jobs and the daemons; the directory stays
# With PID, it is taken down when that process is gone, however it went.
# Every node is a slurmd on an address of its own (127.0.0.11, 127.0.0.12 ...), with 4 processors and 4000 MB, whatever
# the machine has; MSLM_LAB_NODE replaces that, such as "CPUs=8 RealMemory=8000". Nothing but DIRECTORY is written.
set -euo pipefail

die() { printf 'slurm_lab: %s\n' "$*" >&2; exit 2; }

usage() { sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

# In a session of its own (a Ctrl-C of the terminal is not for it) and without our output, whose reader would wait for it.
start() {
    local log=$1
    shift
    setsid "$@" < /dev/null > "$log" 2>&1 &
    echo $! >> "$lab/pids"
}

wait_for() {
    local what=$1
    shift
    for _ in $(seq 150); do
        if "$@" > /dev/null 2>&1; then return; fi
        sleep 0.1
    done
    die "$what; the logs are in $lab/log."
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# A daemon with -D stays our child's child: one that made itself a daemon would leave a zombie where nobody is init.
start_node() {
    mkdir -p "$lab/spool.$1"
    start "$lab/log/slurmd.$1.out" slurmd -D -f "$SLURM_CONF" -N "$1"
}

all_idle() { [ "$(sinfo --noheader --Node --states=idle | wc -l)" = "$1" ]; }

start_munge() {
    mkdir -p "$lab/munge"
    head -c 1024 /dev/urandom > "$lab/munge/key"
    chmod 400 "$lab/munge/key"
    # As root like the other daemons, and with --force: DIRECTORY may lie where the user munge cannot look (mktemp -d).
    start "$lab/log/munged.out" munged --foreground --force --num-threads=2 \
        --key-file="$lab/munge/key" --socket="$lab/munge/sock" --pid-file="$lab/munge/pid" \
        --seed-file="$lab/munge/seed" --log-file="$lab/munge/log"
    wait_for "munged did not start" test -S "$lab/munge/sock"
}

# The times are a laboratory's: a dead node is noticed in seconds, and a requeued job waits for 11 s instead of 2 minutes.
write_configuration() {
    local nodes=$1 host number
    host=$(hostname -s)
    cat << CONF
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$lab/munge/sock,cred_expire=10
StateSaveLocation=$lab/state
SlurmctldPidFile=$lab/slurmctld.pid
SlurmctldLogFile=$lab/log/slurmctld.log
SlurmdPidFile=$lab/slurmd.%n.pid
SlurmdLogFile=$lab/log/slurmd.%n.log
SlurmdSpoolDir=$lab/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$lab/log/jobcomp.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmctldTimeout=10
SlurmdTimeout=10
JobRequeue=1
SwitchType=switch/none
CONF
    for number in $(seq "$nodes"); do
        echo "NodeName=vn$number NodeHostname=$host NodeAddr=127.0.0.$((10 + number)) Port=$(free_port)" \
            "${MSLM_LAB_NODE:-CPUs=4 RealMemory=4000} State=UNKNOWN"
    done
    echo "PartitionName=main Nodes=vn[1-$nodes] Default=YES MaxTime=INFINITE State=UP"
}

up() {
    local nodes=$1 number
    [ "$(id -u)" = 0 ] || die "Slurm's daemons start jobs in the name of others, which needs root; use sudo."
    for program in munged slurmctld slurmd; do
        command -v "$program" > /dev/null ||
            die "there is no $program. On Debian: apt-get install --no-install-recommends slurm-wlm munge."
    done
    [ ! -e "$SLURM_CONF" ] || die "$lab holds a laboratory already; name another directory, or take it down."
    mkdir -p "$lab/state" "$lab/log"
    start_munge
    write_configuration "$nodes" > "$SLURM_CONF"
    start "$lab/log/slurmctld.out" slurmctld -D -f "$SLURM_CONF"
    for number in $(seq "$nodes"); do start_node "vn$number"; done
    wait_for "the nodes did not come up" all_idle "$nodes"
    if [ -n "$2" ]; then setsid "$0" follow "$lab" "$2" < /dev/null > "$lab/log/follow.out" 2>&1 & fi
    echo "export SLURM_CONF=$SLURM_CONF"
}

# Not a zombie, which nobody may be there to collect.
runs() { [[ $(ps -o stat= -p "$1") =~ ^[^Z] ]]; }

no_jobs() { [ -z "$(squeue --noheader)" ]; }

# Jobs first: the ranks of a job outlive the daemons. The daemons in the reverse order, so that munged is the last.
down() {
    local pid
    [ -e "$lab/pids" ] || return 0
    if [ -e "$SLURM_CONF" ] && timeout 5 scancel --user=root 2> /dev/null; then
        for _ in $(seq 100); do
            if no_jobs; then break; fi
            sleep 0.1
        done
    fi
    while read -r pid; do
        kill "$pid" 2> /dev/null || true
        for _ in $(seq 30); do
            if ! runs "$pid"; then continue 2; fi
            sleep 0.1
        done
        kill -9 "$pid" 2> /dev/null || true
    done < <(tac "$lab/pids")
    rm -f "$lab/pids"
}

case ${1:-} in
    up | down | node | follow) ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && exit 2 ;;
esac
[ $# -ge 2 ] || die "name a directory; see tools/slurm_lab.sh --help."
lab=$(readlink -m "$2")
export SLURM_CONF=$lab/slurm.conf
case $1 in
    up) up "${3:-2}" "${4:-}" ;;
    follow)
        while kill -0 "$3" 2> /dev/null; do sleep 1; done
        down
        ;;
    node) start_node "${3:?a node such as vn2}" ;;
    down) down ;;
esac
