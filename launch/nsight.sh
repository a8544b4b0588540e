#!/usr/bin/env bash
# Runs a rank's command under Nsight Systems, where the rank is one of those chosen; the others run it bare.
#
#   srun launch/nsight.sh [--ranks 0,5] [--out DIR] COMMAND ...
#   torchrun ... --no-python launch/nsight.sh [--ranks 0,5] [--out DIR] COMMAND ...
#   mpirun -n N launch/nsight.sh [--ranks 0,5] [--out DIR] COMMAND ...
#
# COMMAND marks what is captured, as mslm does with profile.profile_tools=nsys-capture; --ranks (default 0, or all) must
# name its profile.profile_ranks: a rank that never calls cudaProfilerStart leaves no report. Each chosen rank leaves
# DIR/rank-N.nsys-rep and DIR/rank-N.sqlite (default DIR: nsight); mslm profile report DIR reads the latter.
set -euo pipefail

refuse() {
    echo "nsight.sh: $1" >&2
    exit 2
}

ranks=0 out=nsight
while [ $# -gt 0 ]; do
    case $1 in
        --ranks | --out)
            [ $# -gt 1 ] || refuse "$1 takes a value."
            if [ "$1" = --ranks ]; then ranks=$2; else out=$2; fi
            shift 2 ;;
        --) shift; break ;;
        -*) refuse "$1 is no option of it; they are --ranks and --out, before the command." ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || refuse "there is no command to run; give one as in: srun launch/nsight.sh --ranks 0 mslm profile ..."

# torchrun's variable first: ranks of torchrun or mpirun inside a Slurm job inherit a SLURM_PROCID that is not theirs.
rank=${RANK:-${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-${SLURM_PROCID:-0}}}}
if [ "$ranks" != all ] && [[ ",$ranks," != *",$rank,"* ]]; then
    exec "$@"
fi
command -v nsys > /dev/null || refuse "nsys is not on PATH of rank $rank ($(hostname)): install Nsight Systems \
(https://developer.nvidia.com/nsight-systems; cluster modules: nsight-systems or cuda; apt package nsight-systems-cli of \
NVIDIA's repository), or profile with --with torch."
mkdir -p "$out"

arguments=(
    --output="$out/rank-$rank"
    # One rank a file; a profile that is made again replaces the old one, as mslm profile does with its run.
    --force-overwrite=true
    --trace=cuda,nvtx,osrt,cudnn,cublas
    # Only between cudaProfilerStart and cudaProfilerStop; the command runs on behind them.
    --capture-range=cudaProfilerApi
    --capture-range-end=stop
    --cuda-memory-usage=true
    # Sampling of the host needs a lowered perf_event_paranoid, and the ranges say where the host is.
    --sample=none
    --cpuctxsw=none
    # What mslm profile report reads.
    --export=sqlite
)
exec nsys profile "${arguments[@]}" "$@"
