#!/bin/bash
#SBATCH --job-name=judge_30b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Train a policy on the gradients of a Qwen3-30B-A3B judge; planned first, saved and requeued when Slurm wants the nodes.
#
#   export POLICY=/models/Qwen3-8B JUDGE=/models/Qwen3-30B-A3B DATA='["/data/train.jsonl"]'
#   sbatch slurm/train_30b.sh
#   sbatch --nodes=4 --time=2-0 slurm/train_30b.sh --policy.layout.tp=2 --grpo.preset=paper
#
# Options of Slurm before the script's name, of `g2r train` after it. From the environment: CONFIG
# (examples/judge_30b/config.yaml), RUN (run directory, runs/<job name>; or --output_dir), POLICY, JUDGE, DATA,
# GPUS_PER_NODE (ranks a node), MAX_STALLED, G2R_HOME, G2R_ENV (slurm/env.sh). The same command goes on with a run.

NAME=train_30b.sh LEAVE=USR1
G2R_HOME=${G2R_HOME:-$SLURM_SUBMIT_DIR}   # Slurm runs a copy of this file, which cannot tell where it comes from
if [ ! -f "$G2R_HOME/slurm/job.sh" ]; then
    echo "$NAME: no slurm/job.sh in $G2R_HOME: submit from the root of the repository, or set G2R_HOME" >&2; exit 2
fi
source "$G2R_HOME/slurm/job.sh"

RUN=${RUN:-$(option output_dir "$@")}
RUN=${RUN:-runs/$SLURM_JOB_NAME}
options=(--config "${CONFIG:-examples/judge_30b/config.yaml}"
    ${POLICY:+--policy.model="$POLICY"} ${JUDGE:+--judge.model="$JUDGE"} ${DATA:+--data.train="$DATA"}
    "$@" --output_dir="$RUN")

# The newest complete checkpoint's step. Not the heartbeat's, which a new attempt begins at 0.
progress() {
    local newest
    newest=$(ls "$RUN/checkpoints" 2>/dev/null | sed -n 's/^step_\([0-9]*\)$/\1/p' | sort | tail -n 1)
    echo $((10#${newest:-0}))
}

# Two jobs must not write one run.
refuse_if_busy() {
    local other
    other=$(sed -n 's/.*"job": "\([^"]*\)".*/\1/p' "$RUN/heartbeat.json" 2>/dev/null)
    if [ -n "$other" ] && [ "$other" != "$SLURM_JOB_ID" ] && [ -n "$(squeue -h -t R,CG -j "$other" 2>/dev/null)" ]; then
        stop "job $other is running in $RUN: wait for it, or set RUN" 2
    fi
}

begin
refuse_if_busy
if [ "$ATTEMPT" = 1 ]; then
    once python -m g2r_megatron.cli plan "${options[@]}" --nodes="$NODES" --gpus_per_node="$GPUS" 2>&1 | tee "$LOG/plan.log"
    code=${PIPESTATUS[0]}
    if [ "$code" != 0 ]; then stop "g2r plan refuses this job (code $code): not started" "$code"; fi
fi
launch -m g2r_megatron.cli train "${options[@]}"
