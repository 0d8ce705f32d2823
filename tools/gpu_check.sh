#!/usr/bin/env bash
# Checks a machine with one GPU in at most 12 minutes, installing nothing: is it right, and how fast is it?
#
#   tools/gpu_check.sh [--output DIR] [--only STAGE,...] [--dry-run]
#
# Plain torch layers alone are enough; with Transformer Engine there is more to check. Writes gpu_check.md and
# gpu_check.json to DIR (gpu_check), after every stage, so that what was done before something failed is kept. --dry-run: the
# same at tiny sizes, also without a GPU. Exit code 0 when all stages passed or had nothing to check. PYTHON=... chooses another
# interpreter than .venv's. docs/first-day-on-gpus.md says what to expect and what to look at when it differs.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x "$ROOT/.venv/bin/python" ]; then PYTHON=$ROOT/.venv/bin/python; fi
fi
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-$UID} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/inductor-$UID}
exec "$PYTHON" "$ROOT/benchmarks/gpu_check.py" "$@"
