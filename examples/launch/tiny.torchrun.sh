#!/usr/bin/env bash
# Trains examples/tiny.yaml on 1 node(s) of 4 processes. Run it on every node.
#   tiny: tensor 1 x pipeline 1 x data 4
#   tiny-grown: tensor 1 x pipeline 1 x data 4
#   tiny-grown-twice: tensor 1 x pipeline 1 x data 4
# A failure starts the ranks of all nodes again from the last checkpoint; a node that comes back joins again.
# SIGTERM: the step is finished and saved, and the script ends with 3. The same command goes on.
set -euo pipefail

# CPU threads of each process: the processes share the cores.
export OMP_NUM_THREADS=1
# Seconds that torchrun leaves its ranks between SIGTERM and SIGKILL, to finish the step and save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120

# This is torchrun, but for its exit status: that of its ranks.
exec python -m flm_megatron.launch.elastic \
    --nnodes 1 --nproc-per-node 4 --max-restarts 10 \
    --standalone \
    -m flm_megatron.cli.main train examples/tiny.yaml
