"""Write numbers and times for people."""

import math


def duration(seconds: float) -> str:
    """A time of at most two units: 48s, 3m20s, 5h12m, 2d04h."""
    if not math.isfinite(seconds):
        return "n/a"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest_s:02}s" if minutes else f"{rest_s}s"


def number(value: float) -> str:
    """A count or rate with thousands separators, and a digit after the point only below 100."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.1f}"
