"""Documents, and the indexed datasets of megatron-core made of them: `build.build_dataset`, checked by `verify`."""
