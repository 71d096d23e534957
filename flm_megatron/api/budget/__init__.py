"""What to do with a budget: how to divide it over stages, and whether to grow at all."""
