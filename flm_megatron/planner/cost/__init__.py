"""What a step costs: bytes of `memory` and `activations`, seconds of `compute` and `communication`."""
