"""Command-line tools around data, checkpoints and scores."""
