"""Folders that cannot be used end a run before its first step, with their name."""

import os
from pathlib import Path

import pytest
from helpers.permissions import bound_by_permissions
from helpers.runs import write_config

from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.training.train import run


def start(path: Path) -> None:
    run(load_config(path, (), world_size=1), resume=True)


def test_a_read_only_output_folder_is_named(tmp_path):
    path = write_config(tmp_path, training__max_steps=1)
    folder = tmp_path / "runs"
    folder.mkdir(mode=0o555)
    with (
        bound_by_permissions(),
        pytest.raises(OSError, match=f"cannot make {folder}/run: Permission denied; choose another"),
    ):
        start(path)


def test_a_run_directory_that_became_read_only_is_named(tmp_path):
    path = write_config(tmp_path, training__max_steps=1)
    start(path)
    folder = tmp_path / "runs" / "run"
    for file in ("ds_config.json", ".lock"):
        folder.chmod(0o555)
        try:
            with (
                bound_by_permissions(),
                pytest.raises(OSError, match=f"cannot write {folder}/{file}: Permission denied; "),
            ):
                start(path)
        finally:
            folder.chmod(0o755)
        (folder / ".lock").unlink(missing_ok=True)  # the next time it cannot be made


def test_a_truncated_data_cache_is_named_with_its_file_and_the_remedy(tmp_path):
    path = write_config(tmp_path, training__max_steps=1)
    start(path)
    largest = max((tmp_path / "cache").rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
    os.truncate(largest, largest.stat().st_size - 1)
    with pytest.raises(
        ValueError, match=rf"prepared data: {largest} has [\d,]+ bytes, must have [\d,]+; remove"
    ) as error:
        run(load_config(path, ["name=second"], world_size=1), resume=False)
    assert f"remove {largest.parent} to have it prepared again" in str(error.value)
