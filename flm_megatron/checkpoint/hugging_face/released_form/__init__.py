"""The two files that every exported Tele-FLM folder carries, so that `transformers` can load it.

They are copied as they are; they import nothing of this project.
"""
