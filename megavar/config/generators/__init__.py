"""Generators: one module per architecture; see :mod:`megavar.config.generators.base`."""
