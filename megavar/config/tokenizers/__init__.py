"""Image tokenizers: one module per architecture; see :mod:`megavar.config.tokenizers.base`."""
