"""Lists of scales to train on: one module per rule; see :mod:`megavar.config.scale_lists.base`."""
