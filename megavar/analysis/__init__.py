"""Looks at trained runs: the figures and analyses of the papers, as data and as pictures."""
