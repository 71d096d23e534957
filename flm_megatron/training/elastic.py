"""The name under which scripts of earlier versions start torchrun: `python -m flm_megatron.training.elastic ARGUMENTS`.

Nothing is imported from `launch`, which lies above: this runs the program of today's name in its own place.
"""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("flm_megatron.launch.elastic", run_name="__main__", alter_sys=True)
