"""Processes of one world: under which addresses they reach each other."""
