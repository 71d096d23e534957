"""Encode text into an indexed dataset: the same as `flm data build`."""

import sys

from flm_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["data", "build", *sys.argv[1:]]))
