"""What outside programs may watch of a rank while it trains: numbers for Prometheus, spans for OpenTelemetry.

`observers` has the interface and tells all observers, `opening` makes those that a run asks for, `prometheus` and
`spans` are the two. Their libraries are imported where a run asks for them, and nowhere else.
"""

from flm_megatron.training.telemetry.observers import Observer, Observers
from flm_megatron.training.telemetry.opening import require_telemetry, telemetry

__all__ = ["Observer", "Observers", "require_telemetry", "telemetry"]
