"""Copy a checkpoint to another file layout, dtype or format; the processes of `torchrun` or `srun` share the work."""

import sys

from flm_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["checkpoint", "reshard", *sys.argv[1:]]))
