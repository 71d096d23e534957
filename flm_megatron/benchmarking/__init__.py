"""Measured throughput: of a stage, of its layouts, beside other programs, and of this machine's own products."""
