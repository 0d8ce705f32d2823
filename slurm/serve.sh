#!/bin/bash
#SBATCH --job-name=serve
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@90
#SBATCH --output=%x-%j.log
# The judge as a service of the cluster; its URL is in URL_FILE while it answers.
#
#   openssl rand -hex 32 > key; chmod 600 key
#   KEY_FILE=key sbatch slurm/serve.sh --judge.model=/models/Qwen3-30B-A3B
#   G2R_API_KEY=$(cat key) python -c 'from g2r_megatron.client import Judge; print(Judge(open("serve.url").read().strip()).model())'
#
# The HTTP front runs on the first node, outside the steps, and starts the judge's ranks with srun and torchrun; when a
# rank dies it starts them again. Options of Slurm before the script's name, of `g2r serve` after it. From the
# environment: CONFIG (examples/judge_30b/judge.yaml has options of g2r judge; none by default), KEY_FILE (needed), PORT
# (8000), URL_FILE (serve.url), GPUS_PER_NODE, G2R_HOME, G2R_ENV.

G2R_HOME=${G2R_HOME:-$SLURM_SUBMIT_DIR}   # Slurm runs a copy of this file, which cannot tell where it comes from
cd "$G2R_HOME" && [ -f slurm/env.sh ] || { echo "serve.sh: no slurm/env.sh in $G2R_HOME: set G2R_HOME" >&2; exit 2; }
[ -n "${KEY_FILE-}" ] || { echo "serve.sh: KEY_FILE is not set: other machines reach the service" >&2; exit 2; }
GPUS=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}   # ranks a node
LOG=${LOG:-/tmp}
source "${G2R_ENV:-slurm/env.sh}"
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# torchrun on every node; the first rank is on the first node, beside the front
LAUNCHER="srun --kill-on-bad-exit=1 --cpu-bind=none ${G2R_SRUN[*]} ${G2R_EXEC[*]} bash slurm/torchrun_node.sh
    --nnodes=$SLURM_JOB_NUM_NODES --nproc-per-node=$GPUS --master-addr=$MASTER --master-port=$((20000 + SLURM_JOB_ID % 10000))"

"${G2R_EXEC[@]}" python -m g2r_megatron.cli serve ${CONFIG:+--config "$CONFIG"} --serve.host=0.0.0.0 \
    --serve.port="${PORT:-8000}" --serve.api_key_file="$KEY_FILE" --serve.url_file="${URL_FILE:-serve.url}" \
    --serve.launcher="$LAUNCHER" "$@" &
front=$!
trap 'kill -TERM $front' TERM   # 90 s before the time limit, or scancel --batch --signal=TERM: what was accepted is answered
wait "$front"; code=$?
while kill -0 "$front" 2>/dev/null; do wait "$front"; code=$?; done
exit "$code"
