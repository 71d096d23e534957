"""Loss on text: `bits_per_byte` over `windows` that predict every token once; `run` is `flm eval bpb`."""
