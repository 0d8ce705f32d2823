# What is particular to your site: read by every script of this directory, on the first node, before anything starts.
# Options of Slurm (partition, account, time, QoS) go on the command line of sbatch or into SBATCH_* variables:
#   export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=myproject
# Nothing here is needed if the repository's `make install` has made .venv and the nodes have a working network.

# --- Software ---------------------------------------------------------------------------------------------------------
# module load cuda/13.0

# A virtual environment on a file system that all nodes see ...
G2R_VENV=${G2R_VENV:-$G2R_HOME/.venv}
if [ -d "$G2R_VENV/bin" ]; then PATH=$G2R_VENV/bin:$PATH; fi

# ... or a container (tools/container). G2R_SRUN: further options of srun. G2R_EXEC: what stands before every command on
# every node. The code is that of G2R_HOME, which is the working directory; the image brings what it imports.
G2R_SRUN=()
G2R_EXEC=()
# enroot with pyxis:
# G2R_SRUN=(--container-image=/images/g2r.sqsh --container-mounts="$G2R_HOME,/scratch" --container-workdir="$G2R_HOME")
# apptainer:
# G2R_EXEC=(apptainer exec --nv --bind "$G2R_HOME,/scratch" --pwd "$G2R_HOME" /images/g2r.sif)

# --- CPU threads of a rank --------------------------------------------------------------------------------------------
# Its share of the node's cores, 16 at the most. torchrun would set 1, which starves background saves and reading data.
share=$((${SLURM_CPUS_ON_NODE:-$(nproc)} / ${GPUS:-1}))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share < 1 ? 1 : share > 16 ? 16 : share))}

# --- Network ----------------------------------------------------------------------------------------------------------
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0    # the interface between the nodes, where NCCL picks a wrong one
# export NCCL_IB_HCA=mlx5                                 # the InfiniBand adapters
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# A rank that hangs ends the run after timeout_minutes; the last collectives of every rank are then in the logs of the
# attempt. (The watchdog, its monitor and the recorder are switched on by g2r itself: parallel/groups.py.)
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-${LOG:-/tmp}/collectives_rank_}

# --- Caches -----------------------------------------------------------------------------------------------------------
# Compiled kernels: on the node's own disk, not in a home directory that all ranks of all nodes lock.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-$UID}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/inductor-$UID}
# Models are read from the directories you give; nothing is downloaded.
export HF_HUB_OFFLINE=1
