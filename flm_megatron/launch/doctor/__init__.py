"""Checks of the machines before a run: what would stop it, and what would slow it down."""
