"""Routers: one file each, named by a choice under ``config/experts/``; see :mod:`megavar.transformer.moe.router`."""
