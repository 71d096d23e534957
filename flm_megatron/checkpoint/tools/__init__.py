"""What `flm checkpoint` does: `inspect`, `verify`, `compare`, `reshard`, and hashes of what the values are."""
