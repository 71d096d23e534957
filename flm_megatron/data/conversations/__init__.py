"""Fine-tuning data: files of conversations, the templates that make text of them, and samples packed from that.

`stream.ChatStream` is what is trained on; `screening` chooses few good conversations out of many.
"""
