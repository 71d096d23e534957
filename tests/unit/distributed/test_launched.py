"""Tools under a launcher leave no thread of a process group behind."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os
from pathlib import Path
from flm_megatron.distributed.launched import launched_processes

def threads():
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]

with launched_processes() as processes:
    import torch.distributed.checkpoint  # what tools load while the group runs
    processes.on_first(lambda: 1)
    assert any("gloo" in name for name in threads()), threads()
assert not any("gloo" in name for name in threads()), threads()
"""


def test_no_gloo_thread_outlives_the_group(tmp_path: Path) -> None:
    """One that does can abort the process while the interpreter shuts down, after the work is done."""
    program = tmp_path / "tool.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
