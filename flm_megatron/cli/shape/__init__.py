"""Commands that change the shape of a model, and those that measure what such a change goes by."""
