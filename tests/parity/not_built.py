"""Golden vectors that wait for what they describe. This list only shrinks.

A line is a family, or ``family/case`` where the rest of a family is built. It goes when a ``Family`` claims the cases.
"""

NOT_BUILT: dict[str, str] = {}
