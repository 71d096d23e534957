"""Reading a run file."""

from __future__ import annotations

from flm_megatron.checkpoint.run_file import open_run
from flm_megatron.config.overrides import Overrides
from flm_megatron.config.schema import RunConfig
from flm_megatron.paths import FilePath, given_path


def load_run(path: FilePath, overrides: Overrides = ()) -> RunConfig:
    """The run that a YAML file describes: presets and defaults merged, models that a checkpoint brings written out.

    `overrides` are fields by their path, `{"stages.0.parallel.tensor": 2}`, or words as on the command line,
    `["--stages.0.parallel.tensor", "2"]`. Types are checked here; whether the run can be planned, trained or grown
    into, by the functions that do so.

    >>> run = load_run("run.yaml", {"stages.0.tokens": 1e6})
    >>> run.stages[0].tokens
    1000000

    Raises:
        RequestError: no such file, not YAML, an unknown key or preset, or values of the wrong type (all are listed).
        DamagedError: a model comes from a checkpoint that cannot be read.
    """
    return open_run(given_path(path, "path"), overrides)
