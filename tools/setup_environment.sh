#!/usr/bin/env bash
# Makes or brings up to date a virtual environment for working on this repository:
#   [PYTHON=python3.11] [MSLM_TORCH=cpu|cuda] tools/setup_environment.sh [DIRECTORY, default .venv]
# Without MSLM_TORCH, torch's CPU build is taken where no NVIDIA GPU is seen: the CUDA build is several GB larger.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv}
python=${PYTHON:-python3}

die() { printf 'setup_environment: %s\n' "$*" >&2; exit 2; }

command -v "$python" > /dev/null || die "there is no '$python' on PATH. Give another with PYTHON=/path/to/python3.11."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
    3.10 | 3.11 | 3.12) ;;
    *) die "'$python' is Python $version, and megatron-core 0.16.1 needs 3.10, 3.11 or 3.12. Give one with PYTHON=python3.11." ;;
esac
build=${MSLM_TORCH:-}
if [ -z "$build" ]; then
    build=cpu
    if [ -e /dev/nvidia0 ] || nvidia-smi -L > /dev/null 2>&1; then build=cuda; fi
fi
case $build in
    cpu | cuda) ;;
    *) die "MSLM_TORCH is '$build'; it is cpu or cuda." ;;
esac
"$python" -c 'import ensurepip, venv' 2> /dev/null ||
    die "'$python' cannot make virtual environments (no ensurepip). On Debian: apt-get install python$version-venv."

if ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
    # An unfinished environment is made anew; anything else that lies there is not ours to clear.
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
        die "$venv exists and is no virtual environment. Name another directory, or remove it."
    fi
    echo "Making $venv with Python $version; installing takes about 4 minutes."
    "$python" -m venv --clear "$venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

torch=$(sed -n 's/^torch==//p' constraints.txt)
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
installed=$("$venv/bin/python" -c 'from importlib import metadata; print(metadata.version("torch"))' 2> /dev/null || true)
# Fetched by itself, so that nothing else is looked for at the second address, which may be out of reach: half a minute
# is the most that it may then cost.
if [ "$build" = cpu ] && [ "${installed%%+*}" != "$torch" ] && ! "${pip[@]}" download --quiet --no-deps --retries 1 \
    --timeout 15 -d "$wheels" --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu"; then
    echo "torch $torch has no CPU build for Python $version here: the default build follows, several GB." >&2
fi

# Without build isolation, as everybody builds beside torch; setuptools must then be there first.
"${pip[@]}" install --quiet -c constraints.txt setuptools
"${pip[@]}" install --quiet -c constraints.txt --find-links "$wheels" --no-build-isolation -e '.[cluster,dali,data,dev,oracle,prometheus]'
"${pip[@]}" check
"$venv/bin/python" -c 'import torch; print("torch", torch.__version__, "with" if torch.version.cuda else "without", "CUDA")'
