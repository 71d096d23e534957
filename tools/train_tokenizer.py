"""Train a tokenizer: the same as `flm data tokenizer`."""

import sys

from flm_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["data", "tokenizer", *sys.argv[1:]]))
