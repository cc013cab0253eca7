"""One module per kind of analysis; each is named by a choice in ``config/analyses``."""
