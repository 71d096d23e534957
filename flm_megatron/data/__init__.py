"""Text into tokens, tokens into datasets, datasets into one stream of samples.

`corpus` makes datasets, `conversations` holds the data of fine-tuning, `streams` is the order in which samples are
trained on; `tokenizer` wraps SentencePiece, `tokenizers` and `tiktoken`.
"""
