"""Starting, watching and explaining runs: Slurm and single machines, preflight checks, post-mortems."""
