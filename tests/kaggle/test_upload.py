"""Uploading: the official client is called as it should be, and without it the steps are said."""

import json
import sys
from types import SimpleNamespace

import pytest
from conftest import seal_again

import upload
from bundle_manifest import VERIFICATION

CLIENT = """
import json, os, sys
from pathlib import Path
folder = Path(os.environ["FAKE_KAGGLE"])
calls = folder / "calls.jsonl"
previous = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
with calls.open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
words = sys.argv[1:]
if words[:2] == ["kernels", "push"]:
    path = Path(words[words.index("-p") + 1])
    (folder / "kernel.json").write_text((path / "kernel-metadata.json").read_text())
    assert (path / "notebook.ipynb").is_file()
    print("Kernel push error: no such accelerator" if (folder / "refuse").exists() else "pushed")
if words[:2] == ["datasets", "status"]:
    exists = (folder / "exists").exists() or any(call[1] in ("create", "version") for call in previous)
    looks = sum(call[1] == "status" for call in previous)
    print("ready" if exists and looks >= 2 else "pending" if exists else "403 Forbidden")
    sys.exit(0 if exists else 1)
"""


@pytest.fixture
def bundle(artifacts):
    """A bundle that counts as verified."""
    folder = artifacts / "bundle"
    seal_again(folder, {"passed": True, "checks": []})
    return folder


@pytest.fixture
def client(tmp_path, monkeypatch):
    """A kaggle package that notes how it is called; credentials in the environment."""
    package = tmp_path / "site/kaggle"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(CLIENT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("FAKE_KAGGLE", str(tmp_path))
    monkeypatch.setenv("KAGGLE_API_TOKEN", "x")
    return SimpleNamespace(
        folder=tmp_path,
        calls=lambda: [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()],
    )


def test_a_new_data_set_is_created_waited_for_and_used(bundle, client, capsys):
    upload.upload(bundle, owner="me", slug="my-bundle", poll_seconds=0.01)
    words = [call[:2] for call in client.calls()]
    assert words == [
        ["datasets", "status"],
        ["datasets", "create"],
        *[["datasets", "status"]] * 2,
        ["kernels", "push"],
    ]
    metadata = json.loads((client.folder / "kernel.json").read_text())
    assert metadata["enable_internet"] is False and metadata["dataset_sources"] == ["me/my-bundle"]
    assert metadata["competition_sources"] == ["lmsys-chatbot-arena"]
    assert json.loads((bundle / "dataset-metadata.json").read_text())["id"] == "me/my-bundle"
    assert "kaggle competitions submit lmsys-chatbot-arena -k me/my-bundle" in capsys.readouterr().out


def test_a_data_set_that_is_there_gets_a_new_version(bundle, client):
    (client.folder / "exists").touch()
    upload.upload(bundle, owner="me", slug="my-bundle", poll_seconds=0.01)
    assert ["datasets", "version", "-p", str(bundle), "-r", "tar", "-m", "just submit"] in client.calls()


def test_a_failure_that_the_client_only_words_is_one(bundle, client):
    (client.folder / "refuse").touch()
    with pytest.raises(ValueError, match="Kernel push error: no such accelerator"):
        upload.upload(bundle, owner="me", slug="my-bundle", poll_seconds=0.01)


def test_without_credentials_the_steps_are_said(bundle, client, monkeypatch, tmp_path):
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(ValueError, match=r"(?s)no Kaggle credentials.*pip install kaggle six.*-r tar.*T4 x2"):
        upload.upload(bundle, owner="me", slug="my-bundle")
    assert not (client.folder / "calls.jsonl").exists()


def test_without_the_client_the_steps_are_said(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaggle", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the kaggle client is not installed"):
        upload.upload(bundle, owner="me", slug="my-bundle")


@pytest.mark.parametrize(
    ("variables", "file", "is_there"),
    [
        ({}, None, False),
        ({"KAGGLE_USERNAME": "me"}, None, False),
        ({"KAGGLE_USERNAME": "me", "KAGGLE_KEY": "x"}, None, True),
        ({}, "kaggle.json", True),
        ({}, "access_token", True),
    ],
)
def test_where_credentials_are_looked_for(client, tmp_path, variables, file, is_there):
    (tmp_path / ".kaggle").mkdir()
    if file:
        (tmp_path / ".kaggle" / file).touch()
    assert (upload.missing(variables, tmp_path) is None) == is_there


def test_an_unverified_or_changed_bundle_is_refused(bundle, client):
    (bundle / "code/infer.py").write_text("")
    with pytest.raises(ValueError, match="has sha256"):
        upload.upload(bundle, owner="me", slug="my-bundle")
    (bundle / VERIFICATION).unlink()
    with pytest.raises(ValueError, match="was not verified"):
        upload.upload(bundle, owner="me", slug="my-bundle")
    assert not (client.folder / "calls.jsonl").exists()
