"""Attention: `core` computes it with the masks of documents, `self_attention` is the layer, `cache` for generation."""
