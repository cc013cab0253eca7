"""How a tool ends: what people can mend is one paragraph on standard error, and an exit code."""

import sys
from collections.abc import Callable

from megavar.errors import ExitCode, MegavarError

INTERRUPTED = 130
"""What shells report for Ctrl-C."""


def outcome(tool: str, work: Callable[[], int | None]) -> int:
    """Run ``work`` and return its exit code (None: success), or that of what it raised."""
    try:
        return work() or int(ExitCode.FINISHED)
    except MegavarError as error:
        message, code = str(error), int(error.exit_code)
    except OSError as error:
        message, code = f"{error}. Correct that, and run the same command again.", int(ExitCode.FAILED)
    except KeyboardInterrupt:
        message, code = "interrupted. The same command continues.", INTERRUPTED
    print(f"{tool}: {message}", file=sys.stderr)
    return code
