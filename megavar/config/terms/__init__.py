"""Terms: one module per loss that combines with any recipe; see :mod:`megavar.config.terms.base`."""
