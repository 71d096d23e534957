#!/usr/bin/env bash
# Trains {{run_file}} on {{nodes}} node(s) of {{per_node}} processes. Run it on every node.
{{summary}}
{{failures}}
# SIGTERM: the step is finished and saved, and the script ends with 3. The same command goes on.
set -euo pipefail

{{environment}}

# This is torchrun, but for its exit status: that of its ranks.
exec python -m flm_megatron.launch.elastic \
    --nnodes {{nodes}} --nproc-per-node {{per_node}} --max-restarts {{restarts}} \
    {{rendezvous}} \
    -m flm_megatron.cli.main {{command}}
