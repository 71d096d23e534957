"""Lease."""
