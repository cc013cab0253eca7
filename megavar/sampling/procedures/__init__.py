"""Decoding procedures: one module each; see :mod:`megavar.sampling.base`."""
