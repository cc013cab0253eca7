"""Suites of metrics for generators: one module each; see :mod:`megavar.config.suites.base`."""
