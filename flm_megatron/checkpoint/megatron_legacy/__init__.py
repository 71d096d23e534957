"""Checkpoints of Megatron-LM's own layout, one file for each model-parallel rank: `reader`, `writer`, `arguments`."""
