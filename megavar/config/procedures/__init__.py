"""Decoding procedures: one module each; see :mod:`megavar.config.procedures.base`."""
