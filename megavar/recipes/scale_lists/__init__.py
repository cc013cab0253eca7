"""Lists of scales to train on: one module per rule; see :mod:`megavar.recipes.scale_lists.base`."""
