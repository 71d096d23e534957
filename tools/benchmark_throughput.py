"""Measure the throughput of a stage, of its layouts or beside other programs: the same as `flm bench`."""

import sys

from flm_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
