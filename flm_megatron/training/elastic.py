"""The earlier name of `launch.elastic`, kept for scripts that run `python -m flm_megatron.training.elastic ARGUMENTS`.

It imports nothing from `launch`, which lies above this room: it replaces itself by the program under its new name.
"""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("flm_megatron.launch.elastic", run_name="__main__", alter_sys=True)
