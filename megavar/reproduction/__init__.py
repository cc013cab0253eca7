"""A paper's table and this library: what its rows cost, what they gave here, and the same rows at a small size."""
