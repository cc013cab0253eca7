"""Folders that official scorers of text-to-image benchmarks read: one module each; see :mod:`.base`."""
