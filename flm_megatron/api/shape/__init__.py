"""Changing the shape of a model, and measuring what such a change goes by."""
