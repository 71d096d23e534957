"""Bytes on disk, for all formats: read with their checksums, and written so that a crash leaves the old or the new.

`manifest` describes a checkpoint and lists its files, `block_checksums` checks every MiB that is read, `destination`
makes a folder appear when it is complete, `stored_array` reads any region of an array in a file, `torch_file` finds the
arrays in files of `torch.save`.
"""
