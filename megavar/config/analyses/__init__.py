"""Analyses of trained runs: one module per kind; see :mod:`megavar.config.analyses.base`."""
