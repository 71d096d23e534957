"""Checkpoints: a set of logical tensors of which any region can be read, whatever it is stored in.

`logical` says what a checkpoint is to everything else (`LogicalCheckpoint.read(name, region)`),
`opening.open_checkpoint` opens any folder, `store` is the checkpoints of a run: which are whole, newest, and kept.
`torch_dist`, `hugging_face` and `megatron_legacy` are formats; `lazy` are checkpoints that are computed when they are
read; `memory` are copies in the memory of hosts; `sharding` lies between a checkpoint and a model that is trained;
`tools` copy and compare; `files` is what all formats share, and `lease` keeps two writers apart.
"""
