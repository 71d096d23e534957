"""The format that is written: megatron-core's `torch_dist`, read by PyTorch's distributed checkpointing as well.

`reader.TorchDistCheckpoint` and `writer.copy_checkpoint` are the two ways. A `.distcp` file is written by `shard_file`,
a tensor in it by `tensor_record`; `metadata` reads the index of a checkpoint, `logical_hash` sums up a tensor's values
whatever its chunks are.
"""
