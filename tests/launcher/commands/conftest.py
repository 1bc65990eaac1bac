import sys
import types
from pathlib import Path

import pytest
from helpers.command_line import MINIMAL


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """The calls of train.run, which is replaced like topology.quiet before it, in a folder that holds run.yaml."""
    calls = []
    debugs = []
    monkeypatch.setattr("xformer_train.launcher.processes.topology.quiet", debugs.append)
    module = types.ModuleType("xformer_train.launcher.training.train")
    module.run = lambda loaded, *, resume: calls.append((loaded, resume, debugs[-1]))
    monkeypatch.setitem(sys.modules, "xformer_train.launcher.training.train", module)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    # Invoked in this process, the command sets this variable for good; a value of ours makes the test undo it.
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    Path("run.yaml").write_text(MINIMAL)
    return calls
