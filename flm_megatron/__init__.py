"""Train very large language models in stages: train, grow, train on, under tensor, pipeline and data parallelism.

From a run file (`config`) to a trained checkpoint: `launch` starts the processes, `training` is the loop, `growth`
makes a larger model out of a smaller one, `checkpoint` reads and writes what lies on disk, `planner` says what a run
will need before it has it. megatron-core is the parallel engine. docs/architecture.md shows the rooms and their order.
"""

__version__ = "0.1.0"
