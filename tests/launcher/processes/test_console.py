"""A console that goes away before its run."""

import os
import subprocess
import sys
from pathlib import Path

from xformer_train.launcher.processes import console


def test_a_run_whose_console_is_gone_goes_on_and_keeps_its_exit_status():
    """As behind `| head`, or when ssh has ended. Python's own flush at the end would make it 120."""
    code = (
        "import sys; from xformer_train.launcher.processes import console\n"
        "sys.stdin.readline()\n"
        "for text in ('one', 'two'): console.say(text); console.warn(text)\n"
        "print('of a library')\n"
        "sys.exit(75)"
    )
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=write, stderr=write)
    os.close(write)
    os.close(read)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 75


def test_a_console_on_a_full_disk_keeps_what_is_written_when_there_is_room():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "from xformer_train.launcher.processes import console; console.say('x'); import os; os._exit(3)",
            ],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (3, b"")


def test_a_console_that_nobody_reads_any_more_keeps_no_process_from_its_end(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        console.write_now("the run hangs\n")


def test_a_process_that_is_started_without_streams_keeps_its_files_clean_and_its_exit_status(tmp_path):
    code = (
        "import os, subprocess, sys; from xformer_train.launcher.processes import console\n"
        "console.open_missing_streams()\n"
        f"file = open({str(tmp_path / 'metrics')!r}, 'w')\n"
        "console.say('one'); console.warn('two'); console.write_now('three'); print('of a library')\n"
        "os.write(1, b'of C'); os.write(2, b'of C'); assert sys.stdin.read() == ''\n"
        "subprocess.run([sys.executable, '-c', 'import sys; sys.stdout.write(str(1)); sys.stderr.write(str(2))'], check=True)\n"
        "file.write('rows'); sys.exit(75)"
    )
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    done = subprocess.run([*closed, sys.executable, "-c", code], check=False)
    assert (done.returncode, (tmp_path / "metrics").read_text()) == (75, "rows")


def test_a_stream_that_is_closed_under_a_run_is_survived():
    code = (
        "import os, sys; from xformer_train.launcher.processes import console\n"
        "os.close(1); os.close(2)\n"
        "console.say('one'); console.warn('two'); console.write_now('three'); print('of a library')\n"
        "sys.exit(75)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 75
