"""How many values operations work on at a time, by kind of device. No torch here: the planner counts them too."""

from __future__ import annotations

CHUNK_VALUES = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Values of a matrix processed some rows at a time. On a CPU the fp32 temporaries of such a chunk fit a core's cache,
and calls cost little beside the work; on a GPU they are small beside the model."""
SMALLEST_HEAD_CHUNK = {"cpu": 512, "cuda": 2048}
"""Tokens of a chunk of head and loss. Below this many its matrix products no longer fill a processor, and passes over
the gradient of the weight, one for each chunk, begin to count. Measured on a CPU; on a GPU not."""
LARGE_LOGITS_BYTES = 1 << 29
"""From this size on `auto` fuses head and loss, which stores no logits: their memory matters more than time."""
SHARED_READ_BYTES = 32 * 2**20
"""Of what ranks hold alike, read by one of them at a time and held by all meanwhile: large enough for sequential reads,
and so that few blocks, which are checked whole, are read by two ranks."""
FP8_SLAB_VALUES = 1 << 22
"""Values of a product of FP8 matrices that are added to a buffer at a time: 16 MiB in fp32, of the 50 MiB of an H100's
L2 cache."""
