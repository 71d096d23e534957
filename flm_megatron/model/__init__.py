"""The decoder on megatron-core: `build` makes a stage's model chunks, `teleflm` is Tele-FLM on top of GPTModel.

`parameters` is the one table of what a parameter is (shape, axes, kind, initial values, muP scales) and `spec` the
layers built on the engine's. `masks` are growth masks, `lora` low-rank adapters, `forward` runs a model without
gradients.
"""
