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
