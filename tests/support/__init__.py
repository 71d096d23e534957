"""What tests share: processes, hosts, small runs, cases, and oracles that nobody here wrote."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
