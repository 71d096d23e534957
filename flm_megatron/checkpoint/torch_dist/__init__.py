"""Torch dist."""
