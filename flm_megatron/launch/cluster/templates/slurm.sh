#!/usr/bin/env bash
#SBATCH --ntasks-per-node={{per_node}}
{{devices}}{{partition}}#SBATCH --exclusive
#SBATCH --time={{time}}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={{job}}-%j.log
#SBATCH --signal=B:USR1@{{grace}}
# Trains {{run_file}}, one job per stage, each after the one before:
{{summary}}
# `bash THIS_FILE` submits them. A job that reaches its time limit saves and queues itself again under the same
# number, so the jobs behind it wait; so does one that is preempted.
set -euo pipefail

if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    previous=
    submit() {
        previous=$(sbatch --parsable --job-name "{{job}}-$1" --nodes "$2" \
            ${previous:+--dependency="afterok:$previous" --kill-on-invalid-dep=yes} "$0" "$1")
        previous=${previous%%;*}
        echo "stage $1: job $previous on $2 node(s)"
    }
    {{submissions}}
    exit
fi

stage=$1

{{environment}}

# Every task is a rank; the first node is where they meet.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# Slurm warns this shell before the time limit: the ranks are told, save, and end with 3.
warned=
trap 'warned=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap : TERM

# A rank that ends first must not take the others with it; after a failure they notice by themselves.
# shellcheck disable=SC2016 # the variables are the tasks'
srun --kill-on-bad-exit=0 --wait=300 {{container}}bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python -m flm_megatron.cli.main "$@"' rank {{command}} &
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
