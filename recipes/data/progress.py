"""Say how far the reading of a source is."""

import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from ..recipe import Report
from .sources import Source

_REPORT_EVERY_S = 60.0


def with_progress(source: Source, doing: str, report: Report, told: Callable[[], str] = str) -> Iterator[str]:
    """Yield the documents of a pass over a source; show a bar on a terminal, and report a line a minute elsewhere.

    doing: what is done with the documents, such as `tokenising text a.txt`. told: what else a line says, from `, ` on.
    """
    on_terminal = sys.stderr.isatty()
    whole, unit = (source.total, " documents") if source.size is None else (source.size, "B")
    before, told_s = source.read.amount, time.monotonic()
    with tqdm(None, doing, whole, unit=unit, unit_scale=True, disable=not on_terminal, leave=False) as bar:
        for number, document in enumerate(source.documents(), start=1):
            yield document
            done = number if source.size is None else source.read.amount - before
            bar.update(done - bar.n)
            if not on_terminal and time.monotonic() - told_s > _REPORT_EVERY_S:
                told_s = time.monotonic()
                share = f" ({done / whole:.0%})" if whole else ""
                report(f"{doing}: {number:,} documents{share}{told()}")
