"""What is kept on this machine of objects that are read: whole files, and blocks of large ones, up to a size."""
