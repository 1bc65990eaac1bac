"""Fixtures that load run configs from text."""

from pathlib import Path

import pytest

from xformer_train.launcher.config.loading import ConfigError, load_config


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A function that loads a config from text, in an empty current folder, under the name run.yaml."""
    monkeypatch.chdir(tmp_path)

    def load(text, sets=(), flags=None, world_size=1, name="run.yaml"):
        Path(name).write_text(text)
        return load_config(name, sets, flags or {}, world_size)

    return load


@pytest.fixture
def problems(load):
    """A function that returns what is wrong with such a text."""

    def problems(*args, **kwargs):
        with pytest.raises(ConfigError) as error:
            load(*args, **kwargs)
        assert str(error.value) == "\n".join(error.value.problems)
        return error.value.problems

    return problems
