"""Suites of metrics for generators: one module each; see :mod:`megavar.evaluation.base`."""
