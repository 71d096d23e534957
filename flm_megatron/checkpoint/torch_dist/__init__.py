"""The format that is written: megatron-core's `torch_dist`, which PyTorch's distributed checkpointing reads too.

`reader.TorchDistCheckpoint` and `writer.copy_checkpoint` are the two directions. A `.distcp` file is written by
`shard_file`, a tensor in it by `tensor_record`; `metadata` reads the index of a checkpoint, `logical_hash` hashes a
tensor's values independently of its chunks.
"""
