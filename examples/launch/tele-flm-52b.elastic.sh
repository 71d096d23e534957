#!/usr/bin/env bash
# Trains examples/tele-flm-52b.yaml on 112 node(s) of 8 processes. Run it on every node.
#   tele-flm-52b: tensor 4 x pipeline 2 x data 112
# A failure starts the ranks of all nodes again from the last checkpoint; a node that comes back joins again.
# SIGTERM: the step is finished and saved, and the script ends with 3. The same command goes on.
set -euo pipefail

# CPU threads of each process: the processes share the cores.
export OMP_NUM_THREADS=1
# One hardware queue, so that communication starts in the order it was issued and hides behind the
# matrix multiplications; megatron-core counts on it up to Hopper.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Allocator segments that grow, against fragmentation near the memory limit.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
# A collective past its timeout ends the process instead of hanging.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# The last collectives of every rank are kept, and dumped when one times out.
export TORCH_NCCL_TRACE_BUFFER_SIZE=2000
# NCCL speaks of errors only; INFO shows which network it chose.
export NCCL_DEBUG=WARN
# Adapters for the data: all whose name begins so. List them (=mlx5_0,mlx5_1) where some are for
# storage.
export NCCL_IB_HCA=mlx5
# Wait of an adapter for an acknowledgement, 4.096 us x 2^22 = 17 s: a flapping link is outlived.
export NCCL_IB_TIMEOUT=22
# Attempts before the connection is given up; 7 is the most.
export NCCL_IB_RETRY_CNT=7
# Queue pairs of a connection: a routed fabric spreads them over more than one path.
export NCCL_IB_QPS_PER_CONNECTION=4
# RoCE: the address table's entry for RoCE v2 over IPv4; `show_gids` lists them.
export NCCL_IB_GID_INDEX=3
# RoCE: traffic class, DSCP 26 with ECN: the switches have to treat it as lossless (ask for their
# value).
export NCCL_IB_TC=106
# Card for NCCL's first contact (and its data on TCP); without it NCCL takes the first that is up.
export NCCL_SOCKET_IFNAME=eth0
# Card for gloo, which saves checkpoints; without it gloo takes the one of the host's name.
export GLOO_SOCKET_IFNAME=eth0
# Seconds that torchrun leaves its ranks between SIGTERM and SIGKILL, to finish the step and save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120

# This is torchrun, but for its exit status: that of its ranks.
exec python -m flm_megatron.launch.elastic \
    --nnodes 112 --nproc-per-node 8 --max-restarts 10 \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD_NODE:?set it to the name or address of the first node}:29400" \
    --rdzv-id tele-flm-52b --rdzv-conf join_timeout=1800 \
    -m flm_megatron.cli.main train examples/tele-flm-52b.yaml
