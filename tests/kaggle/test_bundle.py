"""A bundle holds what serves, refuses what does not fit together, and rebuilds what changed."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from conftest import make_final, reseal
from safetensors.torch import load_file, save_file

import bundle as bundling
import infer
from bundle import contents
from bundle_manifest import MANIFEST, read_bundle
from common.data.table import LABELS
from common.files import file_hash, read_json, write_json
from common.models import load_model
from common.runs import Run


def build(artifacts, **flags):
    args = bundling.Args(artifacts=artifacts, **flags)
    bundling.build(bundling.describe(args), args, args.output or artifacts / "bundle")


def change_preference(folder, **changes):
    write_json(folder / "preference.json", read_json(folder / "preference.json") | changes)


def test_the_bundle_is_listed_whole_and_in_fp16(built):
    manifest = read_bundle(built / "bundle")
    assert {"notebook.ipynb", "code/infer.py", "code/common/prompts.py"} <= set(manifest["files"])
    for name in ("gemma9b", "armorm8b"):
        tensors = load_file(built / f"bundle/models/{name}/model.safetensors")
        source = load_model(built / f"stage3/{name}-final").state_dict()
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
        assert all(torch.equal(tensor, source[key].half()) for key, tensor in tensors.items())
    assert not list((built / "bundle").rglob("*.pkl")) and not list((built / "bundle").rglob("trained_on*"))
    for name, source in contents(None).items():
        assert file_hash(built / "bundle" / name) == file_hash(source)


def test_defaults_are_the_originals(built):
    found = {m["name"]: (m["order"], m["weight"]) for m in read_bundle(built / "bundle")["models"]}
    assert found == {"armorm8b": ("swapped", 1.0), "gemma9b": ("given", 2.0)}
    assert read_bundle(built / "bundle")["prior"] == pytest.approx([0.4, 0.35, 0.25])


def test_built_again_it_is_up_to_date(artifacts, capsys):
    before = (artifacts / "bundle").stat().st_ino
    build(artifacts)
    assert "bundle is up to date" in capsys.readouterr().out
    assert (artifacts / "bundle").stat().st_ino == before


def test_what_did_not_change_is_taken_over(artifacts, capsys):
    make_final(artifacts / "stage3/gemma9b-final", "gemma9b", "gemma", label_prior=[0.3, 0.3, 0.4])
    before = (artifacts / "bundle/models/armorm8b/model.safetensors").stat().st_ino
    build(artifacts)
    said = capsys.readouterr().out
    assert "armorm8b-final: unchanged since the last bundle" in said and "gemma9b-final: to fp16" in said
    assert (artifacts / "bundle/models/armorm8b/model.safetensors").stat().st_ino == before
    read_bundle(artifacts / "bundle")


def test_a_damaged_bundle_is_built_again(artifacts, capsys):
    (artifacts / "bundle/code/infer.py").write_text("print('hello')\n")
    build(artifacts)
    assert "has sha256" in capsys.readouterr().out
    read_bundle(artifacts / "bundle")


@pytest.mark.parametrize("where", ["code/infer.py", "models/gemma9b/model.safetensors", "notebook.ipynb"])
def test_a_changed_byte_is_refused(artifacts, where):
    path = artifacts / "bundle" / where
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{where} has sha256"):
        read_bundle(artifacts / "bundle")


def test_missing_and_additional_files_are_refused(artifacts):
    (artifacts / "bundle/code/torch.py").write_text("")
    with pytest.raises(ValueError, match=r"not in the manifest: code/torch\.py"):
        read_bundle(artifacts / "bundle")
    (artifacts / "bundle/code/torch.py").unlink()
    (artifacts / "bundle/code/common/data/table.py").unlink()
    with pytest.raises(ValueError, match=r"missing: code/common/data/table\.py"):
        read_bundle(artifacts / "bundle")


def test_what_is_no_file_of_the_bundle_is_refused(artifacts, tmp_path):
    """Unlisted or listed; a linked folder of modules would be imported."""
    bundle = artifacts / "bundle"
    (tmp_path / "elsewhere").mkdir()
    shutil.copyfile(bundle / "code/infer.py", tmp_path / "elsewhere/infer.py")
    listed = read_json(bundle / MANIFEST)
    for name, make in (
        ("code/pipe.py", os.mkfifo),
        ("code/polars", lambda path: path.symlink_to(tmp_path / "elsewhere")),
        ("code/other.py", lambda path: path.symlink_to(tmp_path / "elsewhere/infer.py")),
    ):
        make(bundle / name)
        with pytest.raises(ValueError, match=f"not in the manifest: {name}"):
            read_bundle(bundle)
        files = listed["files"] | {name: listed["files"]["code/infer.py"]}
        write_json(bundle / MANIFEST, listed | {"files": files})
        with pytest.raises(ValueError, match=f"{name} (is no regular file|leads to .* outside of)"):
            read_bundle(bundle)
        (bundle / name).unlink()
        write_json(bundle / MANIFEST, listed)
    read_bundle(bundle)
    (bundle / MANIFEST).rename(tmp_path / "elsewhere/manifest.json")
    (bundle / MANIFEST).symlink_to(tmp_path / "elsewhere/manifest.json")
    with pytest.raises(ValueError, match=r"manifest\.json leads to .* outside of"):
        read_bundle(bundle)


@pytest.mark.parametrize("name", ["../test.csv", "/etc/hostname", "code//infer.py", "code/../code/infer.py"])
def test_names_that_leave_the_bundle_are_refused(artifacts, name):
    manifest = read_json(artifacts / "bundle" / MANIFEST)
    (artifacts / "test.csv").write_text("")
    files = manifest["files"] | {name: file_hash(artifacts / "test.csv")}
    write_json(artifacts / "bundle" / MANIFEST, manifest | {"files": files})
    with pytest.raises(ValueError, match=f"missing: {name}"):
        read_bundle(artifacts / "bundle")


@pytest.mark.parametrize("name", ["models/other", "../stage3/gemma9b-final", "/tmp", "models/gemma9b/", "."])
def test_a_model_folder_that_is_not_listed_is_refused(artifacts, name):
    manifest = read_json(artifacts / "bundle" / MANIFEST)
    manifest["models"][0]["folder"] = name
    write_json(artifacts / "bundle" / MANIFEST, manifest)
    with pytest.raises(ValueError, match=f"lists no files of the model folder '{name}'"):
        read_bundle(artifacts / "bundle")


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "format": (0, "1", None),
        "classes": ([], None, "ABC"),
        "files": ([], None, {"a": "b"}, {"a": None}, {"a": ["0" * 64]}),
        "prior": ([1.0], None, ["a", "b", "c"], [float("nan")] * 3, [2, 0, 0]),
        "models": ([], {}, None, [1], "x"),
        "scaling": ([], "x", {}, {"scale": [1, 1, 1]}, {"scale": [1, 1, 1], "bias": [0, "x", 0]}),
        "requirements": (None, []),
        "requirements.libraries": (None, ["torch"]),
        "requirements.kernel": (None, "ipykernel"),
        "models.name": (None, 5, ""),
        "models.folder": (None, 5, ["x"]),
        "models.format": (None, 5),
        "models.order": (None, "backwards", ["given"]),
        "models.weight": (None, -1, "2", float("nan"), True),
        "models.template_hash": (None, "x"),
        "models.checkpoint": (None, 5),
        "models.checkpoint_hash": (None, "x"),
    }.items(),
)
def test_a_manifest_that_is_not_whole(artifacts, field, values):
    path = artifacts / "bundle" / MANIFEST
    original = read_json(path)
    for value in ("absent", *values):
        manifest = read_json(path)
        *outer, name = field.split(".")
        place = manifest[outer[0]] if outer else manifest
        place = place[-1] if isinstance(place, list) else place
        place[name] = value
        if value == "absent":
            del place[name]
        path.write_text(json.dumps(manifest))
        with pytest.raises(
            ValueError, match=rf"manifest\.json: .*{name}.* is .*, expected .*; the bundle is not"
        ):
            read_bundle(artifacts / "bundle")
        write_json(path, original)


@pytest.mark.parametrize("field", ["prompt", "formats", "num_classes"])
def test_a_model_whose_preference_is_not_whole_is_not_served(artifacts, field):
    """Nor bundled: the same reader, whoever wrote the file."""
    for folder in (artifacts / "stage3/gemma9b-final", artifacts / "bundle/models/gemma9b"):
        change_preference(folder, **{field: None})
    reseal(artifacts / "bundle")
    entry = read_bundle(artifacts / "bundle")["models"][-1]
    with pytest.raises(ValueError, match=rf"preference\.json: {field}.* is .*, expected"):
        infer.predict_model(artifacts / "bundle", entry, [], (), [torch.device("cpu")], torch.float32, 100)
    with pytest.raises(ValueError, match=rf"preference\.json: {field}.* is .*, expected"):
        build(artifacts)


def test_a_failed_copy_names_what_failed(artifacts, tmp_path, monkeypatch):
    """What cannot be read is the input's fault, what cannot be written the bundle's."""
    wheels, bundle = tmp_path / "wheels", artifacts / "bundle"
    wheels.mkdir()
    (wheels / "x.whl").write_bytes(b"wheel")
    args = bundling.Args(artifacts=artifacts, wheels=wheels)
    manifest = bundling.describe(args)
    opened = Path.open
    model = "models/gemma9b/model.safetensors"

    def failing(*parts):
        def maybe(self, mode="r", *args, **kwargs):
            if mode in parts and self.match(parts[-1]):
                raise OSError(28 if mode == "wb" else 13, "failed so")
            return opened(self, mode, *args, **kwargs)

        monkeypatch.setattr(Path, "open", maybe)

    made = bundling.converted_models(bundle)
    monkeypatch.setattr(bundling, "converted_models", lambda *bundles: made)
    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(18, "no links here")))
    for mode, name, blamed in (
        ("rb", "x.whl", f"{wheels}/x.whl cannot be read: failed so"),
        ("wb", "x.whl", f"cannot write {bundle}: failed so"),
        ("rb", f"bundle/{model}", f"{bundle}/{model} cannot be read: failed so"),
    ):
        failing(mode, name)
        with pytest.raises(ValueError, match=blamed):
            bundling.build(manifest, args, bundle)
        monkeypatch.setattr(Path, "open", opened)
    read_bundle(bundle)


def test_one_final_is_a_bundle_too(artifacts):
    shutil.rmtree(artifacts / "stage3/armorm8b-final")
    build(artifacts)
    assert [m["name"] for m in read_bundle(artifacts / "bundle")["models"]] == ["gemma9b"]


def test_no_final(tmp_path):
    with pytest.raises(ValueError, match=r"holds no final .* just stage3 MODEL --final"):
        build(tmp_path)
    assert not (tmp_path / "bundle").exists()


def test_a_final_that_is_not_what_its_run_has_left(artifacts):
    folder = artifacts / "stage3/gemma9b-final"
    Run(folder=folder, description={"recipe": {}, "inputs": {}}, is_complete=False).finish({})
    build(artifacts)
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: bytes \d+, but \d+ when the run was"):
        build(artifacts)


def test_an_unfinished_final(artifacts):
    write_json(artifacts / "stage3/gemma9b-final/run.json", {"status": "started"})
    with pytest.raises(ValueError, match=r"gemma9b-final is not finished \(status started\)"):
        build(artifacts)


def test_another_class_order(artifacts):
    change_preference(artifacts / "stage3/armorm8b-final", classes=[LABELS[1], LABELS[0], LABELS[2]])
    with pytest.raises(ValueError, match=r"armorm8b-final answers in the class order \['winner_model_b'"):
        build(artifacts)


def test_another_template(artifacts):
    folder = artifacts / "stage3/armorm8b-final"
    prompt = read_json(folder / "preference.json")["prompt"]
    change_preference(folder, prompt=prompt | {"prompt_hash": "f" * 64})
    with pytest.raises(ValueError, match="was trained with prompt ffffffffffff, but this code"):
        build(artifacts)


def test_another_tokenizer(artifacts):
    path = artifacts / "stage3/armorm8b-final/tokenizer.json"
    tokenizer = read_json(path)
    tokenizer["model"]["merges"].pop()
    write_json(path, tokenizer)
    with pytest.raises(ValueError, match="was trained with prompt"):
        build(artifacts)


def test_a_validation_run(artifacts):
    folder = artifacts / "stage3/gemma9b-final"
    change_preference(folder, lineage={"train": "v" * 64, "held_out": "h" * 64})
    with pytest.raises(ValueError, match="is a validation run"):
        build(artifacts)


def test_different_votes(artifacts):
    folder = artifacts / "stage3/gemma9b-final"
    change_preference(folder, lineage={"train": "w" * 64, "held_out": None})
    with pytest.raises(ValueError, match=r"different votes \(vvvvvvvvvvvv and wwwwwwwwwwww\)"):
        build(artifacts)
    build(artifacts, accept_different_data=True)


def test_the_same_final_twice_and_another_stage(artifacts):
    final = artifacts / "stage3/gemma9b-final"
    shutil.copytree(final, artifacts / "stage3/copy-final")
    with pytest.raises(ValueError, match="hold the same weights"):
        build(artifacts, finals=(final, artifacts / "stage3/copy-final"))
    change_preference(artifacts / "stage3/armorm8b-final", stage="stage1")
    with pytest.raises(ValueError, match="of the stages stage3 and stage1"):
        build(artifacts, finals=(final, artifacts / "stage3/armorm8b-final"))


def test_a_truncated_shard_leaves_no_bundle(artifacts):
    path = artifacts / "stage3/gemma9b-final/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    shutil.rmtree(artifacts / "bundle")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        build(artifacts)
    path.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read|missing"):
        build(artifacts)
    assert not (artifacts / "bundle").exists()


def test_what_fp16_cannot_hold(artifacts):
    final = artifacts / "stage3/gemma9b-final"
    tensors = load_file(final / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, final / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(artifacts / "bundle")
    with pytest.raises(ValueError, match=r"model\.norm\.weight .* holds NaN or infinity as torch\.float16"):
        build(artifacts)
    assert not (artifacts / "bundle").exists()


def test_a_folder_of_something_else_stays(artifacts, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds files but no manifest\.json"):
        build(artifacts, output=tmp_path / "mine")
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"


def test_orders_and_weights_are_one_each(artifacts):
    with pytest.raises(ValueError, match="--weights has 1 entries for 2 finals"):
        build(artifacts, weights=(1.0,))
    with pytest.raises(ValueError, match="--fit-weights needs votes"):
        bundling.Args(fit_weights=True)


def evaluation(artifacts, *, num_rows=400):
    """An evaluation in which armorm8b, swapped, is right, and gemma9b knows nothing."""
    draw = np.random.default_rng(0)
    labels = np.eye(3)[draw.integers(3, size=num_rows)]
    groups = {
        "gemma9b/given": np.full((num_rows, 3), 1 / 3),
        "armorm8b/swapped": 0.7 * labels + 0.1,
    }
    keys = {"source": ["s"] * num_rows, "id": [str(i) for i in range(num_rows)]}
    columns = {name: labels[:, i].astype(np.float32) for i, name in enumerate(LABELS)}
    columns |= {
        f"{g}/{n}": v[:, i].astype(np.float32) for g, v in groups.items() for i, n in enumerate(LABELS)
    }
    folder = artifacts / "evaluate/stage3"
    folder.mkdir(parents=True)
    pl.DataFrame(keys | columns).write_parquet(folder / "probabilities.parquet")
    return folder


def test_fitted_weights_go_to_the_better_model(artifacts, capsys):
    evaluation(artifacts)
    build(artifacts, evaluation="stage3", fit_weights=True)
    found = {m["name"]: m["weight"] for m in read_bundle(artifacts / "bundle")["models"]}
    assert found["armorm8b"] > 0.99 and found["gemma9b"] < 0.01
    assert (
        "weights fitted on 400 votes of stage3: gain over [1.0, 2.0] across folds +0."
        in capsys.readouterr().out
    )


def test_kept_scaling_travels_and_must_fit_the_ensemble(artifacts):
    folder = evaluation(artifacts)
    scaling = {"scale": [0.9, 0.9, 0.9], "bias": [0.0, 0.1, 0.0]}
    found = {
        "models": ["armorm8b", "gemma9b"],
        "orders": ["swapped", "given"],
        "weights": [1, 2],
        "kept": "vector",
        "scaling": scaling,
    }
    write_json(folder / "calibration.json", found)
    build(artifacts, evaluation="stage3")
    assert read_json(artifacts / "bundle" / MANIFEST)["scaling"] == scaling
    write_json(folder / "calibration.json", found | {"weights": [1, 1]})
    with pytest.raises(ValueError, match=r"--ensemble-orders swapped given --weights 1\.0 2\.0"):
        build(artifacts, evaluation="stage3")
    write_json(folder / "calibration.json", found | {"kept": None, "scaling": None})
    build(artifacts, evaluation="stage3")
    assert read_json(artifacts / "bundle" / MANIFEST)["scaling"] is None
