"""Benchmarks of vision-language models: one module each; see :mod:`megavar.config.benchmarks.base`."""
