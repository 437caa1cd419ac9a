"""infer.py answers every row, in order, from the bundle alone."""

import argparse
import contextlib
import csv
import json
import re

import numpy as np
import polars as pl
import pytest
import torch
from calling import call
from conftest import ROWS, reseal, write_test_csv
from helpers import ROOT

import infer
from bundle_manifest import MANIFEST
from common.data.table import LABELS
from common.files import read_json, write_json
from common.models import load_model
from common.score.metrics import rescale


def run(bundle, test, output, **flags):
    defaults = {
        "devices": [],
        "dtype": "auto",
        "order": None,
        "max_tokens_per_micro_batch": 512,
        "max_unreadable_share": infer.MAX_UNREADABLE_SHARE,
        "details": None,
    }
    infer.main(argparse.Namespace(bundle=bundle, test=test, output=output, **(defaults | flags)))
    with output.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["id", *LABELS]
    answers = np.array([[float(cell) for cell in row[1:]] for row in rows])
    assert np.allclose(answers.sum(1), 1, atol=1e-9) and (answers >= 0).all()
    return [row[0] for row in rows], answers


def test_ids_in_order_and_the_weighted_mean(built, tmp_path):
    test = write_test_csv(tmp_path / "test.csv")
    ids, answers = run(built / "bundle", test, tmp_path / "s.csv", details=tmp_path / "d.parquet")
    assert ids == [row[0] for row in ROWS]
    details = pl.read_parquet(tmp_path / "d.parquet")
    gemma, armorm = (
        details.select(f"{group}/{label}" for label in LABELS).to_numpy()
        for group in ("gemma9b/given", "armorm8b/swapped")
    )
    assert np.allclose(answers, (2 * gemma + armorm) / 3)
    assert np.abs(gemma - armorm).max() > 0.05


def test_a_swapped_row_gets_the_mirrored_answer_of_the_other_order(built, tmp_path):
    swapped = [(key, prompt, b, a) for key, prompt, a, b in ROWS]
    bundle, output = built / "bundle", tmp_path / "s.csv"
    first, second = (
        run(bundle, write_test_csv(tmp_path / f"{order}.csv", rows), output, order=order)[1]
        for rows, order in ((ROWS, "given"), (swapped, "swapped"))
    )
    assert np.allclose(first, second[:, [1, 0, 2]], atol=1e-6)
    _, both = run(bundle, write_test_csv(tmp_path / "t.csv"), output, order="both")
    _, other = run(bundle, tmp_path / "t.csv", output, order="swapped")
    assert np.allclose(both, (first + other) / 2, atol=1e-6) and not np.allclose(first, other, atol=1e-3)


def test_malformed_rows_get_the_prior_and_are_counted(built, tmp_path, capsys):
    test = tmp_path / "test.csv"
    good = ["5", json.dumps(["hello"]), json.dumps(["a"]), json.dumps(["b"])]
    bad = [
        ["1", "[", good[2], good[3]],
        ["2", good[1], good[2]],
        ["3", good[1], json.dumps(["a", "b"]), good[3]],
        ["4", "[]", "[]", "[]"],
        ["", "{}", good[2], good[3]],
    ]
    with test.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "prompt", "response_a", "response_b"), *bad, good, good])
    ids, answers = run(built / "bundle", test, tmp_path / "s.csv", max_unreadable_share=1.0)
    assert ids == ["1", "2", "3", "4", "", "5", "5"]
    assert np.allclose(answers[:5], [0.4, 0.35, 0.25]) and not np.allclose(answers[5], [0.4, 0.35, 0.25])
    assert np.array_equal(answers[5], answers[6])
    said = capsys.readouterr().out
    assert "computed on cpu in float32, 1 thread\n" in said
    for reason in (
        "malformed JSON",
        "wrong number of cells",
        "unequal turn counts",
        "no turns",
        "no list of texts",
    ):
        assert f"1 {reason}" in said.partition("2 rows answered by the models; with the prior: ")[2]


def test_a_row_that_is_not_utf8_gets_the_prior_and_keeps_its_id(built, tmp_path, capsys):
    test = tmp_path / "test.csv"
    test.write_bytes(
        b'id,prompt,response_a,response_b\n1,"[""caf\xe9""]","[""a""]","[""b""]"\n\xe9,[],[],[]\n'
    )
    ids, answers = run(built / "bundle", test, tmp_path / "s.csv", max_unreadable_share=1.0)
    assert ids == ["1", "\ufffd"]
    assert np.allclose(answers, [0.4, 0.35, 0.25])
    assert "0 rows answered by the models; with the prior: 2 not UTF-8" in capsys.readouterr().out


def write_rows(path, num_good, num_bad):
    """A test.csv whose bad rows have no JSON, or no answer."""
    good = [("g", '["hi"]', '["a"]', '["b"]')] * num_good
    bad = [(f"bad{i}", "[", *["[]"] * (1 + i % 2)) for i in range(num_bad)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "prompt", "response_a", "response_b"), *bad, *good])
    return path


@pytest.mark.parametrize(
    ("num_good", "num_bad", "share", "is_answered"),
    [
        (0, 1, 0.05, False),
        (0, 12, 0.999, False),
        (18, 2, 0.05, False),
        (19, 1, 0.04, False),
        (19, 1, 0.0, False),
        (0, 12, 1.0, True),
        (19, 1, 0.05, True),
        (20, 0, 0.0, True),
    ],
)
def test_unreadable_rows_are_answered_up_to_a_share(built, tmp_path, num_good, num_bad, share, is_answered):
    test = write_rows(tmp_path / "test.csv", num_good, num_bad)
    arguments = {"bundle": built / "bundle", "test": test, "output": tmp_path / "s.csv"}
    if is_answered:
        _, answers = run(**arguments, max_unreadable_share=share)
        assert len(answers) == num_good + num_bad and np.allclose(answers[:num_bad], [[0.4, 0.35, 0.25]])
        return
    with pytest.raises(ValueError, match=f"{num_bad} of {num_good + num_bad} rows cannot be read") as error:
        run(**arguments, max_unreadable_share=share)
    said = str(error.value)
    assert f"--max-unreadable-share {share:g}" in said and "--max-unreadable-share 1 " in said
    assert f"{(num_bad + 1) // 2} wrong number of cells" in said
    assert ("malformed JSON" in said) == (num_bad > 1) and "first ids 'bad0'" in said
    assert ("'bad9'" in said) == (num_bad > 9) and "bad10" not in said
    assert not (tmp_path / "s.csv").exists()


def test_the_notebook_answers_every_id_where_no_row_is_readable(built, tmp_path, monkeypatch):
    """Its cells as they stand, infer.py in this process."""

    def popen(command, **_):
        monkeypatch.setattr("sys.argv", [*map(str, command[1:]), "--bundle", str(built / "bundle")])
        infer.main(infer.parse_arguments())
        return contextlib.nullcontext(argparse.Namespace(stdout=[], returncode=0))

    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs/bundle").symlink_to(built / "bundle")
    write_rows(tmp_path / "inputs/test.csv", 0, 3)
    monkeypatch.setattr("subprocess.Popen", popen)
    monkeypatch.setenv("BUNDLE_INPUTS", str(tmp_path / "inputs"))
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in read_json(ROOT / "kaggle/notebook.ipynb")["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert (tmp_path / "submission.csv").read_text().count("bad") == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nubmer", "1"], "unrecognized arguments: --nubmer 1"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--max-tokens-per-micro-batch", "0"], "--max-tokens-per-micro-batch 0: expected at least 1"),
        (["--max-unreadable-share", "nan"], "--max-unreadable-share nan: expected 0 to 1"),
        (["--max-unreadable-share", "5"], "--max-unreadable-share 5.0: expected 0 to 1"),
        ([], "has no manifest.json"),
    ],
)
def test_a_mistake_is_one_line_and_status_1_as_anywhere(words, said, tmp_path):
    called = call(
        "../kaggle/infer", "--test", tmp_path / "nowhere.csv", "--bundle", tmp_path, words, check=False
    )
    assert called.status == 1 and called.stdout == ""
    assert re.fullmatch(rf"error: .*{re.escape(said)}.*\n", called.stderr)


@pytest.mark.parametrize("both", [False, True])
def test_a_row_whose_logits_are_not_finite_does_without_that_model(
    built, tmp_path, monkeypatch, capsys, both
):
    test = write_test_csv(tmp_path / "test.csv")
    _, expected = run(built / "bundle", test, tmp_path / "s.csv", details=tmp_path / "d.parquet")
    details = pl.read_parquet(tmp_path / "d.parquet")
    armorm = details.select(f"armorm8b/swapped/{label}" for label in LABELS).to_numpy()

    def broken(folder, **arguments):
        model = load_model(folder, **arguments)
        if both or folder.name == "gemma9b":
            longest = int(
                details[
                    "gemma9b/given/input_ids" if "gemma" in str(folder) else "armorm8b/swapped/input_ids"
                ].list.len()[1]
            )
            forward = model.forward
            model.forward = lambda packed: torch.where(
                (packed.cu_seqlens.diff() == longest)[:, None], torch.nan, forward(packed)
            )
        return model

    monkeypatch.setattr(infer, "load_model", broken)
    _, answers = run(built / "bundle", test, tmp_path / "s.csv")
    said = capsys.readouterr().out
    assert f"gemma9b, given order: logits are not finite for 1 rows, ids '{ROWS[1][0]}'" in said
    assert np.allclose(answers[1], [0.4, 0.35, 0.25] if both else armorm[1])
    assert np.allclose(answers[[0, 2]], expected[[0, 2]])
    assert ("no model has finite logits" in said) == both


def test_the_scaling_is_applied(artifacts, tmp_path):
    test = write_test_csv(tmp_path / "test.csv")
    _, before = run(artifacts / "bundle", test, tmp_path / "s.csv")
    manifest = read_json(artifacts / "bundle" / MANIFEST)
    manifest["scaling"] = {"scale": [0.5, 0.5, 0.5], "bias": [0.0, 0.0, 1.0]}
    write_json(artifacts / "bundle" / MANIFEST, manifest)
    _, after = run(artifacts / "bundle", test, tmp_path / "s.csv")
    assert np.allclose(after, rescale(before, [0.5] * 3, [0.0, 0.0, 1.0])) and not np.allclose(after, before)


def test_replicas_on_several_devices_and_any_budget_agree(built):
    folder = built / "bundle/models/gemma9b"
    draw = np.random.default_rng(0)
    sequences = [draw.integers(5, 200, size=n) for n in (9, 3, 40, 1, 17, 5, 64)]

    def logits(devices, max_tokens):
        return infer.run_replicas(
            lambda device: load_model(folder, device=device),
            sequences,
            devices=[torch.device("cpu")] * devices,
            max_tokens=max_tokens,
            description="test",
        )

    alone = logits(1, 10_000)
    assert np.isfinite(alone).all()
    for devices, max_tokens in ((1, 1), (2, 20), (3, 70)):
        assert np.allclose(logits(devices, max_tokens), alone, atol=1e-5)


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("where", ["load", "forward"])
def test_a_device_without_memory_says_what_to_do(num_devices, where):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ValueError, match=r"x does not fit cpu.* smaller --max-tokens-per-micro-batch"):
        infer.run_replicas(
            fail if where == "load" else lambda device: fail,
            [np.arange(3)] * 9,
            devices=[torch.device("cpu")] * num_devices,
            max_tokens=3,
            description="x",
        )


def test_bf16_is_decided_by_capability(monkeypatch):
    gpu = [torch.device("cuda:0")]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert infer.choose_dtype("auto", gpu) == torch.float16
    with pytest.raises(ValueError, match=r"compute capability 7\.5, bf16 needs 8\.0"):
        infer.choose_dtype("bf16", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert infer.choose_dtype("bf16", gpu) == torch.bfloat16
    assert infer.choose_dtype("auto", [torch.device("cpu")]) == torch.float32
    with pytest.raises(ValueError, match="--devices cuda:7 is not here"):
        infer.find_devices(["cuda:7"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("id,prompt,response_a,response_b\n", "has a header and no row"),
        ("id,prompt,response_a\n1,[],[]\n", "lacks the column response_b"),
        ('id,prompt,response_a,response_b\n1,"[""a""]","[""a', "Is the file cut off"),
    ],
)
def test_a_test_csv_that_cannot_be_answered(built, tmp_path, text, message):
    (tmp_path / "test.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        run(built / "bundle", tmp_path / "test.csv", tmp_path / "s.csv")
    assert not (tmp_path / "s.csv").exists()


def test_extra_and_reordered_columns_change_nothing(built, tmp_path):
    _, expected = run(built / "bundle", write_test_csv(tmp_path / "test.csv"), tmp_path / "s.csv")
    with (tmp_path / "other.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("response_b", "note", "id", "response_a", "prompt"))
        writer.writerows((json.dumps(b), "x", key, json.dumps(a), json.dumps(p)) for key, p, a, b in ROWS)
    ids, found = run(built / "bundle", tmp_path / "other.csv", tmp_path / "s.csv")
    assert ids == [row[0] for row in ROWS] and np.array_equal(found, expected)


def test_a_manifest_of_another_class_order_or_template(artifacts, tmp_path):
    test = write_test_csv(tmp_path / "test.csv")
    path = artifacts / "bundle" / MANIFEST
    manifest = read_json(path)
    write_json(path, manifest | {"classes": [LABELS[1], LABELS[0], LABELS[2]]})
    with pytest.raises(ValueError, match="expected the class order"):
        run(artifacts / "bundle", test, tmp_path / "s.csv")
    manifest["models"][0]["template_hash"] = "0" * 64
    write_json(path, manifest)
    with pytest.raises(ValueError, match="the manifest says 000000000000"):
        run(artifacts / "bundle", test, tmp_path / "s.csv")


def test_a_changed_tokenizer_is_found_even_when_the_hashes_were_renewed(artifacts, tmp_path):
    path = artifacts / "bundle/models/gemma9b/tokenizer.json"
    tokenizer = read_json(path)
    tokenizer["model"]["merges"].pop()
    write_json(path, tokenizer)
    test = write_test_csv(tmp_path / "test.csv")
    with pytest.raises(ValueError, match=r"tokenizer\.json has sha256"):
        run(artifacts / "bundle", test, tmp_path / "s.csv")
    reseal(artifacts / "bundle")
    with pytest.raises(ValueError, match="was trained with prompt"):
        run(artifacts / "bundle", test, tmp_path / "s.csv")
