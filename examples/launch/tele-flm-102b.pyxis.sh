#!/usr/bin/env bash
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=tele-flm-102b-%j.log
#SBATCH --signal=B:USR1@600
# Trains examples/tele-flm-102b.yaml, one job per stage, each after the one before:
#   tele-flm-102b: tensor 4 x pipeline 4 x data 56
# `bash THIS_FILE` submits them. A job that reaches its time limit saves and queues itself again under the same
# number, so the jobs behind it wait; so does one that is preempted.
set -euo pipefail

if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    previous=
    submit() {
        previous=$(sbatch --parsable --job-name "tele-flm-102b-$1" --nodes "$2" \
            ${previous:+--dependency="afterok:$previous" --kill-on-invalid-dep=yes} "$0" "$1")
        previous=${previous%%;*}
        echo "stage $1: job $previous on $2 node(s)"
    }
    submit tele-flm-102b 112
    exit
fi

stage=$1

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
# Card for NCCL's first contact (and its data on TCP); without it NCCL takes the first that is up.
export NCCL_SOCKET_IFNAME=ib0
# Card for gloo, which saves checkpoints; without it gloo takes the one of the host's name.
export GLOO_SOCKET_IFNAME=ib0

# Every task is a rank; the first node is where they meet.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# Slurm warns this shell before the time limit: the ranks are told, save, and end with 3.
warned=
trap 'warned=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap : TERM

# A rank that ends first must not take the others with it; after a failure they notice by themselves.
# shellcheck disable=SC2016 # the variables are the tasks'
srun --kill-on-bad-exit=0 --wait=300 \
    --container-image=registry.example.com#flm-megatron:latest --no-container-mount-home --container-workdir="$PWD" \
    --container-mounts="$PWD:$PWD,/scratch:/scratch" \
    bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python -m flm_megatron.cli.main "$@"' rank train examples/tele-flm-102b.yaml --stage "$stage" &
step=$!

# `wait` also ends when a signal arrives.
status=0
while kill -0 "$step" 2>/dev/null; do
    status=0
    wait "$step" || status=$?
done

# Before the time limit, and when the job is preempted (the ranks hear that from Slurm, and are faster than its grace
# time), the job goes into the queue again; after scancel it does not. 3 says that the ranks have saved; ranks that
# were still starting end otherwise and have nothing to save. 2 is a wrong request.
preempted() { scontrol show job "$SLURM_JOB_ID" | grep -q "PreemptTime=[0-9]"; }
if [[ $status != 0 && $status != 2 ]] && { [[ -n $warned ]] || preempted; }; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
