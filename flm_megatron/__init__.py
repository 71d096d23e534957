"""Train very large language models in stages: train, grow, train on, under tensor, pipeline and data parallelism."""

__version__ = "0.1.0"
