"""Megatron legacy."""
