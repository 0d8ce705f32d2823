#!/bin/bash
#SBATCH --job-name=convert_30b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=4:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Convert a checkpoint, either way; needs no GPU. Training and judging read both kinds: this is for what leaves or comes.
#
#   sbatch slurm/convert_30b.sh --hf=/models/Qwen3-30B-A3B --output=/models/qwen3-30b-megatron
#   sbatch slurm/convert_30b.sh --checkpoint=runs/judge_30b/checkpoints/step_00000200 --output=/models/trained
#
# The output is whole or absent, so an attempt that was killed begins anew. From the environment: PROCESSES (4),
# MAX_STALLED, G2R_HOME, G2R_ENV.

NAME=convert_30b.sh LEAVE=TERM
G2R_HOME=${G2R_HOME:-$SLURM_SUBMIT_DIR}   # Slurm runs a copy of this file, which cannot tell where it comes from
if [ ! -f "$G2R_HOME/slurm/job.sh" ]; then
    echo "$NAME: no slurm/job.sh in $G2R_HOME: submit from the root of the repository, or set G2R_HOME" >&2; exit 2
fi
source "$G2R_HOME/slurm/job.sh"

GPUS=${PROCESSES:-4}
progress() { echo 0; }   # all or nothing: MAX_STALLED attempts in all

begin
if [ -n "$(option hf "$@")" ]; then
    launch tools/convert_hf_to_megatron.py "$@"
else
    launch tools/convert_megatron_to_hf.py "$@"
fi
