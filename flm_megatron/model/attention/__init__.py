"""Attention: `core` computes it, `segments` within packed conversations, `window` to the last positions,
`self_attention` is the layer, `cache` for generation."""
