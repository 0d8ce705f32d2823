#!/usr/bin/env bash
# Installs the GPU stack at pinned versions into the active Python environment, and this project into it.
#
#   tools/install_gpu.sh --dry-run           print what would be run
#   tools/install_gpu.sh [--flash-attn] [--no-apex] [--no-driver] [--python PATH]
#
# Needs: Linux, Python 3.11 or newer in an environment of your own, the CUDA toolkit of TORCH_CUDA (nvcc: Apex and parts of
# Transformer Engine are compiled) and git. What is there already at its pinned version is left alone, so it can be run
# again. --no-driver: on a build node without a GPU. MAX_JOBS limits the compilers that run at once.
#
# The versions: torch is what CI runs, and what vLLM 0.28 and later ask for; a container image may bring another one, from
# LEAST_TORCH on, which is then kept with a warning. megatron-core 0.16.1 takes Transformer Engine >= 2.9 and < 2.12;
# whether 2.11 compiles on torch 2.13 has not been tried yet. Transformer Engine 2.11 takes FlashAttention 2.1.1 to 2.8.3;
# torch's default wheel is built for the CUDA version below, which nvcc must have. NVIDIA Apex is not on PyPI (`apex`
# there is another project): it is built from source, at the commit of its tag 25.09.
set -euo pipefail

TORCH=2.13.0
LEAST_TORCH=2.11
TORCH_CUDA=13.0
TRANSFORMER_ENGINE=2.11.0
FLASH_ATTN=2.8.3
APEX_COMMIT=4bdecd06b3c4b2c0a8fb6603829a8f9f05a42b49
APEX_REPOSITORY=https://github.com/NVIDIA/apex

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=python3
DRY_RUN=false FLASH=false APEX=true DRIVER=true

fail() {
    echo "install_gpu: error: $1" >&2
    exit 2
}

# A check that fails ends the installation; a dry run goes on to show the commands.
problem() {
    if $DRY_RUN; then echo "# would stop: $1"; else fail "$1"; fi
}

run() {
    if $DRY_RUN; then
        printf '%q ' "$@" && echo
    else
        echo "+ $*" && "$@"
    fi
}

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
}

while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) DRY_RUN=true ;;
        --flash-attn) FLASH=true ;;
        --no-apex) APEX=false ;;
        --no-driver) DRIVER=false ;;
        --python) [ $# -gt 1 ] || fail "--python: no value given; give the path of a Python"; PYTHON=$2 && shift ;;
        -h | --help) usage && exit 0 ;;
        *) fail "$1: no such option; see --help" ;;
    esac
    shift
done

check_python() {
    command -v "$PYTHON" >/dev/null || fail "$PYTHON: not found; give a Python with --python"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
        || fail "$("$PYTHON" --version): 3.11 or newer is needed; give another one with --python"
    "$PYTHON" -c 'import os, sys; sys.exit(sys.prefix == sys.base_prefix and not os.environ.get("CONDA_PREFIX"))' \
        || problem "$PYTHON is not in an environment of its own; make one: $PYTHON -m venv .venv && source .venv/bin/activate"
    "$PYTHON" -m pip --version >/dev/null 2>&1 || problem "$PYTHON has no pip; install it: $PYTHON -m ensurepip"
}

check_toolkit() {
    local version
    if ! command -v nvcc >/dev/null; then
        problem "nvcc: not found; load the CUDA $TORCH_CUDA toolkit (module load cuda/$TORCH_CUDA, or add its bin to PATH)"
        return
    fi
    version=$(nvcc --version | sed -n 's/.*release \([0-9]*\.[0-9]*\).*/\1/p')
    [ "$version" = "$TORCH_CUDA" ] \
        || problem "nvcc is of CUDA ${version:-unknown}, torch $TORCH of $TORCH_CUDA; extensions must be built with the same: load that toolkit"
    command -v git >/dev/null || problem "git: not found; install it (Apex is built from source)"
}

# A torch that an image brings is kept; what is compiled is then compiled for it.
keep_torch_of_image() {
    local version
    version=$(installed torch)
    if [ -z "$version" ] || [ "$version" = "$TORCH" ]; then return; fi
    if [ "$(printf '%s\n' "$LEAST_TORCH" "$version" | sort -V | head -n 1)" != "$LEAST_TORCH" ]; then
        echo "# torch $version is older than $LEAST_TORCH: replaced by $TORCH"
        return
    fi
    TORCH=$version
    TORCH_CUDA=$("$PYTHON" -c 'import torch; print(torch.version.cuda)')
    echo "# warning: torch $TORCH (CUDA $TORCH_CUDA) is there and kept; this project is tested with the version in $0"
}

check_driver() {
    local version
    $DRIVER || return 0
    if ! command -v nvidia-smi >/dev/null; then
        problem "nvidia-smi: not found; install the NVIDIA driver, or give --no-driver on a build node"
        return
    fi
    version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || version=
    if [ -z "$version" ]; then
        problem "nvidia-smi sees no GPU; check the driver, or give --no-driver on a build node"
    elif [ "${version%%.*}" -lt "$(least_driver)" ]; then
        problem "driver $version is older than $(least_driver), which CUDA $TORCH_CUDA needs; update it"
    fi
}

# The first driver branch that runs programs of CUDA TORCH_CUDA (NVIDIA's table of minor version compatibility).
least_driver() { if [ "${TORCH_CUDA%%.*}" -ge 13 ]; then echo 580; else echo 525; fi; }

# Version of an installed distribution without its local part (+cu128); nothing if it is not there or a CPU build.
installed() {
    "$PYTHON" - "$1" <<'END'
import importlib.metadata, sys
try:
    version, _, local = importlib.metadata.version(sys.argv[1]).partition("+")
    print("" if local == "cpu" else version)
except importlib.metadata.PackageNotFoundError:
    pass
END
}

# The commit that the installed Apex was built from; "unknown" for one from elsewhere, nothing if there is none.
installed_apex() {
    "$PYTHON" - <<'END'
import importlib.metadata, json
try:
    origin = json.loads(importlib.metadata.distribution("apex").read_text("direct_url.json") or "{}")
    print(origin.get("vcs_info", {}).get("commit_id", "unknown"))
except importlib.metadata.PackageNotFoundError:
    pass
END
}

install() { # distribution, version, then pip's arguments
    local name=$1 version=$2
    shift 2
    if [ "$(installed "$name")" = "$version" ]; then
        echo "# $name $version is there"
    else
        run "$PYTHON" -m pip install "$@"
    fi
}

# Headers of cuDNN and NCCL that come with torch's wheels, for what is compiled below.
use_headers_of_wheels() {
    local site path
    site=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    for path in cudnn nccl; do
        if [ -d "$site/nvidia/$path/include" ]; then
            export CPATH="$site/nvidia/$path/include${CPATH:+:$CPATH}"
        fi
    done
}

install_apex() {
    local commit
    commit=$(installed_apex)
    if [ "$commit" = "$APEX_COMMIT" ]; then
        echo "# NVIDIA Apex at $APEX_COMMIT is there"
        return
    fi
    if [ -n "$commit" ]; then # another commit, or PyPI's package of that name
        run "$PYTHON" -m pip uninstall --yes apex
    fi
    run "$PYTHON" -m pip install -v --no-cache-dir --no-build-isolation \
        --config-settings "--build-option=--cpp_ext" --config-settings "--build-option=--cuda_ext" \
        "git+$APEX_REPOSITORY@$APEX_COMMIT"
}

check_python
keep_torch_of_image
check_toolkit
check_driver
install torch "$TORCH" "torch==$TORCH"
run "$PYTHON" -m pip install "setuptools>=77" wheel packaging ninja "cmake>=3.21" "pybind11[global]"
use_headers_of_wheels
core=core_cu${TORCH_CUDA%%.*} # Transformer Engine's own library comes compiled, one for each CUDA
install transformer-engine "$TRANSFORMER_ENGINE" --no-build-isolation "transformer-engine[$core,pytorch]==$TRANSFORMER_ENGINE"
if $FLASH; then install flash-attn "$FLASH_ATTN" --no-build-isolation "flash-attn==$FLASH_ATTN"; fi
if $APEX; then install_apex; fi
run "$PYTHON" -m pip install -e "$ROOT"
run "$PYTHON" -m g2r_megatron.cli doctor
