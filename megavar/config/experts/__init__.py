"""Mixtures of experts: one module per router; see :mod:`megavar.config.experts.base`."""
