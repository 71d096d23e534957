"""Grown."""
