"""What each process leaves of its end for `launch` to read."""

import json
import sys

import pytest

from xformer_train.launcher.commands import app as cli
from xformer_train.launcher.processes.rank_status import FOLDER_VARIABLE, RankStatus, recorded


def status_of(tmp_path, monkeypatch, block):
    """What `recorded` wrote of a block that leaves by an error."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(BaseException), recorded():  # noqa: B017  the test is about what is written
        block()
    return RankStatus(**json.loads((tmp_path / "rank3.json").read_text()))


def test_a_status_holds_the_traceback_of_a_fault(tmp_path, monkeypatch):
    status = status_of(tmp_path, monkeypatch, lambda: {}["key"])
    assert (status.rank, status.exit_code) == (3, 1)
    assert status.text.endswith("KeyError: 'key'\n")
    assert "in <lambda>" in status.text


def test_a_status_holds_the_message_of_an_error_for_the_user(tmp_path, monkeypatch):
    def block():
        cli.app(["--config", "absent.yaml"])

    status = status_of(tmp_path, monkeypatch, block)
    assert status.exit_code
    assert "absent.yaml" in status.text
    assert "Traceback" not in status.text


def test_an_agreed_exit_code_is_kept(tmp_path, monkeypatch):
    status = status_of(tmp_path, monkeypatch, lambda: sys.exit(75))
    assert (status.exit_code, status.text) == (75, "")
