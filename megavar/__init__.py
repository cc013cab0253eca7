"""megavar: a large-scale distributed trainer for visual autoregressive image generators."""

__version__ = "0.1.0"
