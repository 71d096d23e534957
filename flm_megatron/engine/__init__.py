"""The one gate to megatron-core: nothing else in the program imports `megatron`.

Whatever is taken from the engine is handed on by a module of this room, under the engine's own name and typed: groups
and ranks (`parallel_state`), linear layers and collectives (`tensor_parallel`), layers and the GPT model
(`transformer`), schedules, data parallelism, the optimizer, sharded tensors, indexed datasets. `prepare` makes the
device ready and checks the version before the first import; `replaced` puts our operations where the engine calls
others. Two versions stand behind the gate (`version`): where they differ, a module here answers for it.
"""
