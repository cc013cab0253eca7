"""Teachers: one module per network; see :mod:`megavar.config.teachers.base`."""
