#!/bin/bash
# torchrun on one node of a step; srun runs this on each. Arguments: of torchrun, then the program.
exec python -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"
