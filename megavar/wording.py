"""Quantities as people read them, the same wherever they are shown."""


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``5.3 h``, ``3 d 4 h``."""
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min"
    days, hours = divmod(minutes / 60, 24)
    return f"{days:.0f} d {hours:.0f} h" if days else f"{hours:.1f} h"


def clock(seconds: float) -> str:
    """``0:12:05``, for columns."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def size(number: float) -> str:
    """Bytes: ``830 kB``, ``1.4 GB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 999.5 or unit == "TB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if number >= 10 or unit == "B" else f"{number:.1f} {unit}"
