"""Bytes on disk, for all formats: read with their checksums, written so that a crash leaves the old or the new.

`manifest` says what is in a checkpoint and what its files must be, `block_checksums` hold every MiB that is read
against what was written, `destination` makes a folder appear when it is whole, `stored_array` reads any region of an
array in a file, `torch_file` finds arrays in files of `torch.save`.
"""
