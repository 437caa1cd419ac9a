"""Run folders: continue, up to date, or refuse; states that count only when whole."""

import json

import pytest
import torch

from common.files import read_json, replacing, replacing_folder
from common.runs import Run

RECIPE = {"lr": 1e-3, "formats": ("PAB",), "max_tokens_per_micro_batch": 100}


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


def test_another_recipe_is_refused_and_the_field_named(tmp_path):
    open_run(tmp_path).begin()
    with pytest.raises(ValueError, match=r"recipe\.lr is 0\.001; here it is 0\.002"):
        open_run(tmp_path, lr=2e-3)
    with pytest.raises(ValueError, match=r"inputs\.train is abc; here it is other"):
        Run.open(tmp_path, recipe=RECIPE, inputs={"train": "other"})


def test_a_micro_batch_budget_may_change(tmp_path):
    open_run(tmp_path).begin()
    assert open_run(tmp_path, max_tokens_per_micro_batch=50)


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
