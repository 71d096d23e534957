"""Measures that a growth preserved the function: `certificate.certify` runs both models on the same text."""
