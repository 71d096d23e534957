"""Folders of `transformers`: read as logical tensors, and written with a tokenizer and the model's code.

`reader.HuggingFaceCheckpoint` and `writer` are the two ways; `schema` holds a config.json against what is understood,
`config` reads and writes one, `families` translate it, `names` maps tensors, `safetensors` checks and opens the files.
"""
