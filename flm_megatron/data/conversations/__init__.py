"""Fine-tuning data: files of conversations, templates that turn them into text, and packed samples.

`stream.ChatStream` is the stream to train on; `screening` selects few good conversations from many.
"""
