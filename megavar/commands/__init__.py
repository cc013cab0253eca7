"""The command line: each command builds what the configuration describes and runs it."""
