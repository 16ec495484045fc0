"""Finding a checkpoint: a folder, a hub id in the local cache, or one sentence that says what to do."""

import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

from folders import hub_cache, load
from hub.files import find_checkpoint
from hub.writer import write_whole


def test_a_hub_id_is_looked_up_in_the_local_cache(folder, tmp_path, monkeypatch):
    assert find_checkpoint(str(folder)) == folder
    snapshot = hub_cache(monkeypatch, tmp_path / "hub", "somebody/llava-1.5")
    shutil.copytree(folder, snapshot, dirs_exist_ok=True)
    assert find_checkpoint("somebody/llava-1.5") == snapshot
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert torch.equal(load("somebody/llava-1.5").lm_head.weight, load(folder).lm_head.weight)


@pytest.mark.parametrize("installed", [True, False])
def test_an_unknown_id_says_the_command_that_gets_it(tmp_path, monkeypatch, installed):
    def offline(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    if not installed:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="hf download somebody/unheard-of"):
        find_checkpoint("somebody/unheard-of")


@pytest.mark.parametrize("path", ["no such folder", "/no/such/folder", "a/b/c", "./nowhere", "../nowhere", "a b/c"])
def test_a_path_that_leads_nowhere(path, tmp_path, monkeypatch):
    hub_cache(monkeypatch, tmp_path, "a/b")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        find_checkpoint(path)


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    (file := tmp_path / "file.txt").write_text("old")
    file.chmod(0o640)
    (tmp_path / "link.txt").symlink_to("file.txt")
    write_whole(tmp_path / "link.txt", "n\u00e4w \udcff")
    assert file.read_text("utf-8") == "n\u00e4w \\udcff" and file.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "link.txt").is_symlink()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, "newer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "link.txt"]
    assert file.read_text("utf-8") == "n\u00e4w \\udcff"
