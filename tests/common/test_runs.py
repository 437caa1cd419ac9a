"""Run folders: continue, up to date, or refuse; states that count only when whole."""

import json
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import HELD, held_elsewhere

from common import console, files, runs
from common.files import read_json, replacing, write_json
from common.locks import release, replacing_folder
from common.models import checkpoint_hash
from common.runs import Run, find_complete

RECIPE = {"lr": 1e-3, "formats": ("PAB",)}


def open_run(folder, **changes):
    return Run.open(folder, recipe={**RECIPE, **changes}, inputs={"train": "abc"})


def save(run, step, value, keep=1):
    run.save_state(step, {"w": torch.full((3,), value)}, keep=keep, is_writer=True, barrier=lambda: None)


def test_a_new_run_is_started_then_complete(tmp_path):
    folder = tmp_path / "run"
    run = open_run(folder)
    assert not run.is_complete and not folder.exists()
    run.begin()
    assert not open_run(folder).is_complete
    save(run, 1, 1.0)
    run.finish({"log_loss": 1.0})
    again = open_run(folder)
    assert again.is_complete and again.metrics == {"log_loss": 1.0}
    assert not (folder / "state").exists()


def test_two_starts_on_one_folder_are_refused_before_anything_is_read_or_swept(tmp_path):
    folder = tmp_path / "run"
    open_run(folder).begin()
    (folder / "run.json").write_text("{")
    (folder / ".run.json.abcdefgh.tmp").touch()
    release()
    with held_elsewhere(folder), pytest.raises(ValueError, match=HELD):
        open_run(folder)
    assert (folder / ".run.json.abcdefgh.tmp").exists()


def finished(folder):
    """A finished run with a result of each kind, and with what is none."""
    run = open_run(folder)
    run.begin()
    for name in (
        "model.safetensors",
        "deep/page.html",
        "logs/events",
        ".hidden",
        "state/step-1/x",
        "shards/0",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("whole")
    run.finish({"log_loss": 1.0})
    return folder


LOOKS = {"opened": open_run, "found": lambda folder: find_complete(folder.parent)}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("name", ["model.safetensors", "deep/page.html"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("who", "bytes 3, but 5 when the run was finished"),
        (None, "bytes None, but 5 when"),
        ("w-ole", "sha256 [0-9a-f]{64}, but [0-9a-f]{64} when"),
    ],
)
def test_a_finished_run_whose_results_are_not_whole_is_no_finished_run(tmp_path, look, name, text, expected):
    folder = finished(tmp_path / "run")
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    way_out = f"Put it back from a copy, or move {folder} away and start again"
    with pytest.raises(ValueError, match=f"{folder / name}: {expected}.*{way_out}"):
        LOOKS[look](folder)
    assert (folder / "run.json").exists()


@pytest.mark.parametrize("look", LOOKS)
def test_what_comes_or_goes_later_is_no_damage(tmp_path, look):
    folder = finished(tmp_path / "run")
    for name in ("logs/events", ".hidden", "shards/0"):
        (folder / name).unlink()
    for name in ("calibration.json", "logs/more"):
        (folder / name).write_text("new")
    assert LOOKS[look](folder)
    old = read_json(folder / "run.json")
    del old["files"]
    write_json(folder / "run.json", old)
    (folder / "model.safetensors").unlink()
    assert LOOKS[look](folder), "a run of before, which has noted nothing"


def test_a_large_file_is_read_once_a_process(tmp_path, monkeypatch, capsys):
    folder, read = finished(tmp_path / "run"), []
    monkeypatch.setattr(files, "LARGE", 5)
    monkeypatch.setattr(runs, "LARGE", 0)
    hash_of = files.file_hash
    monkeypatch.setattr(files, "file_hash", lambda path: read.append(path.name) or hash_of(path))
    monkeypatch.setattr(console, "SHORT_SECONDS", 0)
    find_complete(tmp_path)
    assert "2/2 files" in capsys.readouterr().out
    first = checkpoint_hash(folder)
    assert sorted(read) == ["model.safetensors", "page.html"]
    (folder / "model.safetensors").write_text("other text")
    assert checkpoint_hash(folder) != first


BROKEN = {
    "{": "cannot be read as JSON",
    "[]": "holds a JSON list",
    '{"recipe": {}}': "has status None, which no run writes",
    '{"status": "paused"}': "has status 'paused', which no run writes",
    '{"status": "started", "recipe": [1]}': r"has recipe \[1\], which",
    '{"status": "started", "inputs": "abc"}': "has inputs 'abc', which",
    '{"status": "complete", "metrics": 1}': "has metrics 1, which",
    '{"status": "complete", "files": {"a": 5}}': "has files {'a': 5}, which",
    '{"status": "complete", "files": {"a": {"bytes": 5}}}': "has files {'a': {'bytes': 5}}, which",
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_run_json_is_one_clear_error(tmp_path, look, text):
    folder = finished(tmp_path / "run")
    (folder / "run.json").write_text(text)
    way_out = f"put it back from a copy, or move {folder} away and start again"
    with pytest.raises(ValueError, match=f"run.json {BROKEN[text]}.*; {way_out}"):
        LOOKS[look](folder)


def test_what_killed_starts_left_is_swept_when_the_run_is_opened(tmp_path, monkeypatch):
    ours = (".a.json.abcd_012.tmp", ".saving-abc/x", "state/step-00000009.tmp/x", "shards/.0.abcdefgh.tmp")
    others = (".notes", ".bundle.old/manifest.json", "state/step-00000005/x", "shards/0")
    folder = tmp_path / "run"
    open_run(folder).begin()
    for name in (*ours, *others):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    run = open_run(folder)
    assert [name for name in (*ours, *others) if (folder / name).exists()] == list(others)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(runs, "remove", lambda paths: 1 / 0)  # killed between the end and the tidying
        run.finish({})
    assert (folder / "state").exists()
    assert open_run(folder).is_complete and not (folder / "state").exists()


def test_another_recipe_is_refused_and_the_field_named(tmp_path):
    open_run(tmp_path).begin()
    with pytest.raises(ValueError, match=r"recipe\.lr is 0\.001; here it is 0\.002"):
        open_run(tmp_path, lr=2e-3)
    with pytest.raises(ValueError, match=r"inputs\.train is abc; here it is other"):
        Run.open(tmp_path, recipe=RECIPE, inputs={"train": "other"})


def test_a_run_of_old_whose_recipe_said_how_it_ran_is_continued(tmp_path):
    open_run(tmp_path, max_tokens_per_micro_batch=16_384, activation_checkpointing=True).begin()
    open_run(tmp_path).finish({})
    assert open_run(tmp_path).is_complete


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"holds files but no run\.json"):
        open_run(tmp_path)


def test_states_are_kept_by_number_and_read_back(tmp_path):
    run = open_run(tmp_path)
    for step in (1, 2, 3):
        save(run, step, float(step), keep=2)
    assert run.saved_steps() == [2, 3]
    state = {"w": torch.zeros(3)}
    run.load_state(3, state)
    assert state["w"].tolist() == [3.0] * 3


def test_a_half_written_state_does_not_count(tmp_path):
    run = open_run(tmp_path)
    save(run, 5, 1.0)
    (tmp_path / "state" / "step-00000009.tmp").mkdir()
    assert run.saved_steps() == [5]


class Evil:
    """What a pickle runs as it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return exec, (f"open({str(self.marker)!r}, 'w')",)


def spoil(folder, evil, *, what):
    """Puts a pickle that runs code into a state: its metadata, or its data, called a tensor or not."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    [info] = metadata.storage_data.values()
    if what == "metadata":
        metadata.planner_data = evil
    else:
        torch.save(evil, folder / info.relative_path)
        info.offset, info.length = 0, (folder / info.relative_path).stat().st_size
    if what == "entry":  # PyTorch unpickles freely what is no tensor
        metadata.state_dict_metadata["w"] = dcp.metadata.BytesStorageMetadata()
        metadata.storage_data = {dcp.metadata.MetadataIndex("w"): info}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("what", ["metadata", "entry", "tensor"])
def test_nothing_of_a_training_state_is_executed(tmp_path, what):
    run = open_run(tmp_path / "run")
    save(run, 3, 1.0)
    marker = tmp_path / "executed"
    spoil(tmp_path / "run/state/step-00000003", Evil(marker), what=what)
    with pytest.raises(ValueError, match=r"step-00000003 cannot be read: .*Delete it, to go on"):
        run.load_state(3, {"w": torch.zeros(3)})
    assert not marker.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_states_of_any_dtype_and_shape_are_read(tmp_path, dtype):
    run = open_run(tmp_path)
    tensors = {"a.b": torch.ones(2, 3).to(dtype), "scalar": torch.tensor(1).to(dtype)}
    run.save_state(1, tensors, keep=1, is_writer=True, barrier=lambda: None)
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    run.load_state(1, found)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_metrics_after_the_resumed_step_are_dropped(tmp_path):
    run = open_run(tmp_path)
    for step in (1, 2, 3):
        run.log({"step": step})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 4, "lo')  # the process died here
    run.keep_metrics_until(2)
    assert [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()] == [1, 2]


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert not path.exists() and list(path.parent.iterdir()) == []
    with replacing(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole"


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match="cannot write"), replacing(tmp_path / "file" / "x") as temporary:
        temporary.write_text("x")
    with pytest.raises(ValueError, match="cannot write"), replacing_folder(tmp_path / "file" / "x"):
        pass


def test_a_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ValueError, match="No space left"), replacing(path) as temporary:
        with open("/dev/full", "w") as full:  # noqa: PTH123 (a device, not a file)
            full.write("x" * 10)
        temporary.write_text("new")
    assert path.read_text() == "old"


def test_broken_json_is_a_clear_error(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected an object"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_json(tmp_path / "a.json")
