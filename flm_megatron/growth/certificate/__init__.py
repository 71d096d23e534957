"""The proof that a growth kept the function: `certificate.certify` runs both models on the same text."""
