"""The library's door, for other programs: ``megavar.load`` and what it returns."""
