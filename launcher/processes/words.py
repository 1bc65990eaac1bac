"""Write numbers, times and sizes for people, and tables of them."""

import math
import sys
from collections.abc import Sequence

_STYLES = {"ok": "green", "warn": "yellow", "FAIL": "bold red", "latest": "green"}
_ENDLESS = 10_000  # columns of an output that is no terminal


def duration(seconds: float) -> str:
    """Return a time of at most two units: 48s, 3m20s, 5h12m, 2d04h."""
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
    """Return a count or rate with thousands separators, and a digit after the point only below 100."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.1f}"


def size(num_bytes: float) -> str:
    """Return a number of bytes in the largest unit that it fills: 12 B, 2.0 KiB, 1.3 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TiB"


def rank_list(ranks: Sequence[int]) -> str:
    """Return `rank 3`, or `ranks 0, 2`."""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def table(rows: Sequence[tuple[str, ...]], widths: Sequence[int] = (), header: bool = False) -> str:
    """Return rows in aligned columns: one line for each row, or on a terminal colored and wrapped to its width.

    widths: the least widths of the first columns. header: whether the first row holds titles.
    """
    from rich.console import Console  # here, as it takes a tenth of a second
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else _ENDLESS)
    grid = Table.grid(padding=(0, 2, 0, 0))
    for column in range(len(rows[0])):
        grid.add_column(
            min_width=widths[column] if column < len(widths) else None,
            no_wrap=column < len(rows[0]) - 1,
            overflow="fold",
        )
    for index, row in enumerate(rows):
        cells = (Text(cell, _STYLES.get(cell, "")) for cell in row)
        grid.add_row(*cells, style="bold" if header and index == 0 else None)
    with console.capture() as capture:
        console.print(grid)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
