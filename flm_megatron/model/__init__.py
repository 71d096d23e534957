"""The decoder on megatron-core: `build` makes the model chunks of a stage, `teleflm` is what it adds to a GPT.

`parameters` is the one table of what a parameter is (shape, axes, kind, initial values, muP's scales) and `spec` the
engine's layers. `masks` are growth's, `lora` low-rank adapters, `forward` runs a model without gradients.
"""
