"""Attention: `core` computes it, `segments` within packed conversations, `self_attention` is the layer, `cache` for
generation."""
