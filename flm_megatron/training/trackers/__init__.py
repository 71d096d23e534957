"""Experiment trackers: a process of their own reads a run's files and sends what is new.

`tracker` is the interface, `names` the trackers that are known by name, `wandb_run` and `mlflow_run` two of them.
`lines` makes points and events of the lines of `metrics.jsonl`, `state` remembers what was sent, `process` is the
process. A process that trains imports no library of a tracker: what it does, and how long it takes, cannot reach it.
"""

from flm_megatron.training.trackers.names import load_tracker
from flm_megatron.training.trackers.tracker import Event, Point, Status, TrackedRun, Tracker

__all__ = ["Event", "Point", "Status", "TrackedRun", "Tracker", "load_tracker"]
