"""The actions of `flm checkpoint`: `inspect`, `verify`, `compare`, `reshard`, and hashes of the values."""
