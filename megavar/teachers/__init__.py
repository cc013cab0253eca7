"""Teachers: frozen networks that give features of images; see :mod:`megavar.teachers.base`."""
