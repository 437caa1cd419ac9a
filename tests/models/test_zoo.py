"""How a name becomes a folder."""

import shutil
from pathlib import Path

import pytest

from common.models import find_checkpoint, load_model, zoo


def test_names(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint 'gemma8b'.*gemma9b, gemma27b, armorm8b, tiny-gemma"):
        load_model("gemma8b")
    with pytest.raises(ValueError, match=r"tiny-gemma: the folder artifacts/demo/models/tiny-gemma does not"):
        load_model("tiny-gemma")
    shutil.copytree(published("llama")[0], tmp_path / "artifacts/demo/models/tiny-llama")
    assert load_model("tiny-llama").hf_config.model_type == "llama"
    asked = []
    monkeypatch.setattr(
        zoo, "snapshot_download", lambda source, allow_patterns: asked.append((source, allow_patterns))
    )
    for name in ("gemma9b", "someone/some-model.v2"):
        with pytest.raises(TypeError):  # the stand-in returns no path
            find_checkpoint(name)
    assert [source for source, _ in asked] == ["google/gemma-2-9b-it", "someone/some-model.v2"]
    assert not any(pattern == "*" or pattern.endswith((".bin", ".py")) for pattern in asked[0][1])
    (tmp_path / "gemma9b").mkdir()
    assert find_checkpoint("gemma9b") == Path("gemma9b")


def test_a_failed_download_says_what_to_do(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise ConnectionError("offline mode is enabled")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"stage1/gemma: no such folder, and .*offline mode(.|\n)*licence"):
        load_model("stage1/gemma")
