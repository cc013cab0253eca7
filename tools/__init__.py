"""Command-line tools around data, checkpoints and scores."""

from megavar import logs

logs.silence_libraries()  # before a tool imports them
