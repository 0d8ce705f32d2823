#!/bin/bash
#SBATCH --job-name=judge
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
# Judge a file of responses; each task of the array judges its share of the rows, the last one to finish joins them.
#
#   sbatch slurm/judge.sh --judge.model=/models/Qwen3-30B-A3B --input=rows.jsonl --output=judged.jsonl
#   sbatch --array=0-31 slurm/judge.sh ...
#   SHARDS=8 sbatch --array=3,5 slurm/judge.sh ...      # only these of 8
#
# A task that was killed goes on after its last batch; submitted again, finished tasks end at once. Options of Slurm
# before the script's name, of `g2r judge` after it. From the environment: CONFIG (examples/judge_30b/judge.yaml), SHARDS
# (the size of the array), GPUS_PER_NODE, MAX_STALLED, G2R_HOME, G2R_ENV.

NAME=judge.sh LEAVE=TERM   # nothing needs saving: what is judged is on the disk
G2R_HOME=${G2R_HOME:-$SLURM_SUBMIT_DIR}   # Slurm runs a copy of this file, which cannot tell where it comes from
if [ ! -f "$G2R_HOME/slurm/job.sh" ]; then
    echo "$NAME: no slurm/job.sh in $G2R_HOME: submit from the root of the repository, or set G2R_HOME" >&2; exit 2
fi
source "$G2R_HOME/slurm/job.sh"

OUTPUT=$(option output "$@")
SHARDS=${SHARDS:-$SLURM_ARRAY_TASK_COUNT}
if [ "$SLURM_ARRAY_TASK_ID" -ge "$SHARDS" ]; then
    stop "task $SLURM_ARRAY_TASK_ID of $SHARDS: set SHARDS to the number of shares in all (tasks are counted from 0)" 2
fi

# Bytes that are judged.
progress() {
    local part
    part=$(printf '%05d-of-%05d.jsonl' "$SLURM_ARRAY_TASK_ID" "$SHARDS")
    stat -c %s "$OUTPUT.parts/$part" "$OUTPUT.parts/.$part.partial" 2>/dev/null | head -n 1 | grep . || echo 0
}

begin
launch -m g2r_megatron.cli judge --config "${CONFIG:-examples/judge_30b/judge.yaml}" "$@" \
    --shards="$SHARDS" --shard="$SLURM_ARRAY_TASK_ID"
