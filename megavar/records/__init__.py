"""What runs have written down, for people who look at several of them. Free of torch: login nodes read it."""
