"""Checkpoints: sets of logical tensors of which any region can be read, in whatever form they are stored.

`logical` is the interface that the rest of the program uses (`LogicalCheckpoint.read(name, region)`), `manifest` is the
record that describes a checkpoint, `opening.open_checkpoint` opens any folder, `store` manages the checkpoints of a
run. `torch_dist`, `hugging_face` and `megatron_legacy` are formats; `lazy` checkpoints are computed when they are read;
`memory` keeps copies in the hosts' memory; `sharding` connects checkpoints with a model in training; `tools` inspect,
compare and copy; `files` is what all formats share, and `lease` keeps a second writer out.
"""
