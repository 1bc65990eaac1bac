"""Numbers, times, sizes and tables as people and scripts read them."""

import os
import pty
import re
import subprocess
import sys

import pytest

from xformer_train.launcher.processes.words import duration, number, size, table

ROWS = [("ID", "SIZE", ""), ("step1", "2.0 KiB", ""), ("step200", "1.3 GiB", "[red]damaged[/red]: " + "word " * 60)]


@pytest.mark.parametrize(
    "num_bytes,text",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (3 * 2**20, "3.0 MiB"),
        (1.3 * 2**30, "1.3 GiB"),
        (2**40, "1.0 TiB"),
        (2**52, "4,096.0 TiB"),
    ],
)
def test_a_size_is_in_the_largest_unit_that_it_fills(num_bytes, text):
    assert size(num_bytes) == text


def test_a_table_that_is_no_terminals_has_a_line_for_each_row(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    lines = table(ROWS, header=True).split("\n")
    assert lines == [
        "ID       SIZE",
        "step1    2.0 KiB",
        "step200  1.3 GiB  [red]damaged[/red]: " + " ".join(["word"] * 60),
    ]
    assert table([("ok", "x", "y")], widths=(4, 3)) == "ok    x    y"


def test_a_table_on_a_terminal_stays_within_it_and_is_colored():
    program = (
        "from xformer_train.launcher.processes.words import table\n"
        f"print(table({ROWS!r}, header=True)); print(table([('FAIL', 'x')]))"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "40", "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    subprocess.run([sys.executable, "-c", program], stdout=theirs, stdin=theirs, check=True, env=environment)
    os.close(theirs)
    shown = b""
    while chunk := _read(ours):
        shown += chunk
    os.close(ours)
    text = shown.decode().replace("\r\n", "\n")
    assert "\x1b[1mID" in text and "\x1b[1;31mFAIL" in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(map(len, plain.splitlines())) <= 40
    assert plain.count("word") == 60


def _read(descriptor):
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other end is closed
        return b""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.6, "1m00s"),
        (200, "3m20s"),
        (3599.4, "59m59s"),
        (18_720, "5h12m"),
        (187_200, "2d04h"),
        (float("nan"), "n/a"),
    ],
)
def test_durations_have_two_units_at_most(seconds, text):
    assert duration(seconds) == text


def test_numbers_have_separators_and_a_digit_only_when_small():
    assert [number(value) for value in (0.44, 99.0, 244_736.4)] == ["0.4", "99.0", "244,736"]
