"""What verification catches: a bundle that answers otherwise than the stages, whatever its hashes say."""

import csv
import json
import os
import shutil
import subprocess
from contextlib import nullcontext
from dataclasses import replace

import pytest
from conftest import ROWS, copy_artifacts, make_final, reseal, write_test_csv
from helpers import ROOT

import bundle as bundling
import submit
import verify
from bundle_manifest import MANIFEST, read_bundle, read_verification
from common.data.table import LABELS
from common.data.votes_csv import BadRowError, parse_texts, read_rows
from common.files import read_json, write_json
from sandbox import NAMESPACE, SOCKET_BLOCK, isolated, isolation, make_environment
from stress import write_stress_set

PROOF = {"stress_rows": 60, "sample_rows": 20}


@pytest.fixture(scope="module")
def submitted(built, tmp_path_factory):
    """An artifacts folder after `just submit`, and its test.csv; never changed by a test."""
    artifacts = copy_artifacts(built, tmp_path_factory.mktemp("submitted") / "artifacts")
    submit.main(submission(artifacts, write_test_csv(artifacts / "test.csv")))
    return artifacts


@pytest.fixture
def verified(submitted, tmp_path):
    """A copy of `submitted` to do as one likes with."""
    return copy_artifacts(submitted, tmp_path / "artifacts")


@pytest.fixture(scope="module")
def python(built, tmp_path_factory):
    """Python of the environment that a bundle of `built` asks for, without sockets."""
    wanted = read_bundle(built / "bundle")["requirements"]
    return make_environment(
        tmp_path_factory.mktemp("environment") / "e",
        wanted["libraries"] | wanted["kernel"],
        block_sockets=True,
    )


@pytest.fixture
def run_verify(python, monkeypatch):
    """Verifies a bundle on the first set only, in a shared environment and the weaker isolation.

    `submitted` was verified on both sets, in an environment of its own and the strongest isolation.
    """
    prepare_sets = verify.prepare_sets
    monkeypatch.setattr(verify, "prepare_sets", lambda *arguments: prepare_sets(*arguments)[:1])
    monkeypatch.setattr(verify, "isolation", lambda: SOCKET_BLOCK)
    monkeypatch.setattr(verify, "make_environment", lambda *_, **__: python)

    def run(artifacts, **flags):
        proof = verify.Proof(**PROOF | flags)
        verify.verify(artifacts / "bundle", proof, artifacts)

    return run


def submission(artifacts, test, **flags):
    return submit.Args(
        build=bundling.Args(artifacts=artifacts, **flags), proof=verify.Proof(test=test, **PROOF)
    )


def edit(artifacts, name, old, new):
    """Changes a line of the bundle's code and renews the hashes."""
    path = artifacts / "bundle/code" / name
    text = path.read_text()
    assert text.count(old) == 1, (name, old)
    path.write_text(text.replace(old, new))
    reseal(artifacts / "bundle")


def test_a_good_bundle_is_verified_and_sealed(verified):
    found = read_verification(verified / "bundle")
    names = {check["name"] for check in found["checks"]}
    assert found["passed"] and {"test: network cut off", "stress: token ids equal the stages'"} <= names
    with (verified / "submission.csv").open(newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["id", "7", "4294967299", "007"]

    write_json(verified / "bundle/verify.json", found | {"checks": []})
    with pytest.raises(ValueError, match="its seal does not fit"):
        read_verification(verified / "bundle")
    write_json(verified / "bundle/verify.json", found)
    reseal_with_another_prior(verified)
    with pytest.raises(ValueError, match="was changed after it was verified"):
        read_verification(verified / "bundle")


def reseal_with_another_prior(artifacts):
    path = artifacts / "bundle" / MANIFEST
    write_json(path, read_json(path) | {"prior": [0.2, 0.2, 0.6]})


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        pytest.param(
            "infer.py",
            'order: mirror(values) if order == "swapped" else values',
            "order: values",
            "test: probabilities within",
            id="a wrong un-swap",
        ),
        pytest.param(
            "infer.py",
            "answers[:, i] for i, name in enumerate(LABELS)}",
            "answers[:, (1, 0, 2)[i]] for i, name in enumerate(LABELS)}",
            "test: probabilities within",
            id="a swapped class order",
        ),
        pytest.param(
            "common/prompts.py",
            'ANSWER_B = "\\n\\n[Answer B]\\n"',
            'ANSWER_B = "\\n\\n[Answer  B]\\n"',
            "was trained with prompt",
            id="a changed template",
        ),
        pytest.param(
            "common/prompts.py",
            "return Rendered([*self.prefix_ids, *body, *self.suffix_ids]",
            "return Rendered([*self.prefix_ids, *body[1:], *self.suffix_ids]",
            "was trained with prompt",
            id="a changed rendering",
        ),
        pytest.param(
            "infer.py",
            'prompter.render(c, format=format, swapped=order == "swapped")',
            'prompter.render(c, format=format, swapped=order != "swapped")',
            "token ids equal the stages': .* differ, first",
            id="a changed rendering that no hash shows",
        ),
    ],
)
def test_what_differs_from_the_stages_is_caught(artifacts, tmp_path, run_verify, name, old, new, message):
    edit(artifacts, name, old, new)
    test = write_test_csv(tmp_path / "test.csv")
    with pytest.raises(ValueError, match=message):
        run_verify(artifacts, test=test)
    assert not (artifacts / "bundle/verify.json").exists() and not (artifacts / "submission.csv").exists()


def test_a_changed_tokenizer_is_caught(artifacts, run_verify):
    path = artifacts / "bundle/models/armorm8b/tokenizer.json"
    tokenizer = read_json(path)
    tokenizer["model"]["merges"].pop()
    write_json(path, tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer\.json has sha256"):
        run_verify(artifacts)
    reseal(artifacts / "bundle")
    with pytest.raises(ValueError, match="was trained with prompt"):
        run_verify(artifacts)


def test_a_notebook_that_raises(artifacts, run_verify):
    path = artifacts / "bundle/notebook.ipynb"
    notebook = read_json(path)
    notebook["cells"][1]["source"] = ["raise RuntimeError('out of luck')"]
    write_json(path, notebook)
    reseal(artifacts / "bundle")
    with pytest.raises(ValueError, match=r"(?s)the notebook raised.*out of luck"):
        run_verify(artifacts)
    assert not (artifacts / "bundle/verify.json").exists()


def test_a_final_that_changed_since(artifacts, run_verify):
    make_final(artifacts / "stage3/gemma9b-final", "gemma9b", "gemma", label_prior=[0.1, 0.1, 0.8])
    with pytest.raises(ValueError, match="build it again"):
        run_verify(artifacts)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("1", 0.5, 0.25, 0.25), ("2", 0.3, 0.3, 0.4)], None),
        ([("2", 0.5, 0.25, 0.25), ("1", 0.3, 0.3, 0.4)], "2 ids, expected the 2 of test.csv in order"),
        ([("1", 0.5, 0.25, 0.25)], "1 ids, expected the 2"),
        ([("1", 0.5, 0.25, 0.25), ("2", 0.3, 0.3, 0.3)], "1 rows, first id 2"),
        ([("1", 0.5, 0.25, 0.25), ("2", "nan", 0.3, 0.3)], "1 rows, first id 2"),
        ([("1", 0.5, 0.25, 0.25), ("2", -0.5, 0.5, 1.0)], "1 rows, first id 2"),
        ([("1", 0.4, 0.35, 0.25), ("2", 0.3, 0.3, 0.4)], "1 malformed rows without the prior"),
    ],
)
def test_what_a_valid_submission_is(tmp_path, rows, message):
    with (tmp_path / "s.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", *LABELS), *rows])
    (tmp_path / "test.csv").write_text("id,prompt,response_a,response_b\n1,[],[],[]\n2,[],[],[]\n")
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        verify.read_answers(tmp_path / "s.csv", tmp_path / "test.csv", [0.5, 0.25, 0.25], {0: "no turns"})


def test_the_stress_set_is_what_it_says(tmp_path):
    malformed = write_stress_set(tmp_path / "a.csv", 3000)
    assert write_stress_set(tmp_path / "b.csv", 3000) == malformed
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    (_, header), *rows = read_rows(tmp_path / "a.csv")
    assert len(rows) == 3000
    for row, (_, cells) in enumerate(rows):
        try:
            texts, _ = parse_texts(header, cells)
            turns = {len(part) for part in texts.values()}
            found = "unequal turn counts" if len(turns) > 1 else "no turns" if turns == {0} else None
        except BadRowError as bad:
            found = bad.args[0]
        assert found == malformed.get(row)
    text = (tmp_path / "a.csv").read_text(encoding="utf-8")
    ids = [cells[0] for _, cells in rows]
    assert len(set(ids)) < len(ids) and max(map(len, ids)) == 40 and "[null]" in text
    assert "<|eot_id|>" in text and "\\ud83e " in text and max(len(cells[1]) for _, cells in rows) > 80_000
    assert set(malformed.values()) >= {"malformed JSON", "no turns", "wrong number of cells"}


def test_a_machine_without_namespaces_verifies_too(artifacts, run_verify):
    run_verify(artifacts)
    assert read_verification(artifacts / "bundle")["isolation"] == SOCKET_BLOCK


def test_a_final_that_is_gone(artifacts, run_verify):
    shutil.rmtree(artifacts / "stage3/gemma9b-final")
    with pytest.raises(ValueError, match=r"gemma9b-final is not there, .* put that final back"):
        run_verify(artifacts)


def test_a_copy_elsewhere_answers_alike_without_network_and_repository(submitted, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(submitted / "bundle", elsewhere)
    requirements = read_bundle(elsewhere)["requirements"]
    how = isolation()
    python = make_environment(
        tmp_path / "environment", requirements["libraries"], block_sockets=how == SOCKET_BLOCK
    )
    test = shutil.copy(submitted / "test.csv", tmp_path)
    command = [str(python), str(elsewhere / "code/infer.py"), "--test", test, "--output", "copy.csv"]
    if how == NAMESPACE:
        repository = [ROOT / name for name in ("common", "stages", "kaggle", "data_prep")]
        command = isolated(command, read_only={elsewhere: elsewhere}, hidden=[*repository, submitted])
    # as many threads as in the run before it: sums over two threads round otherwise on some processors
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "copy.csv").read_text() == (submitted / "submission.csv").read_text()
    read_bundle(elsewhere)  # running it left nothing behind


def test_submit_is_up_to_date_until_something_changes(verified, monkeypatch, capsys):
    """The bundle is verified where it is built; what verifying does is shown above."""
    args = submission(verified, verified / "test.csv")
    assert (verified / "submission.csv").is_file() and not (verified / "bundle-unverified").exists()
    submit.main(args)
    assert "is up to date and verified" in capsys.readouterr().out

    verifications = []

    def prove(bundle, proof, artifacts):
        verifications.append(bundle.name)
        verify.conclude([], bundle, "no isolation", verify.describe_test(proof))

    monkeypatch.setattr(verify, "verify", prove)
    path = verified / "bundle/code/infer.py"
    path.write_text(path.read_text() + "\n")
    submit.main(args)
    said = capsys.readouterr().out
    assert "has sha256" in said and "is complete" in said and verifications == ["bundle-unverified"]
    read_bundle(verified / "bundle")
    read_verification(verified / "bundle")

    write_test_csv(verified / "test.csv", ROWS[:1])
    submit.main(args)
    (verified / "submission.csv").unlink()
    submit.main(args)
    assert len(verifications) == 3


def test_submit_keeps_the_last_good_bundle_where_the_new_one_fails(verified, run_verify, capsys):
    before = json.dumps(read_verification(verified / "bundle"))
    args = submission(verified, verified / "test.csv", weights=(1.0, 3.0))
    with pytest.raises(ValueError, match="probabilities within 0 of the stages'"):
        submit.main(replace(args, proof=replace(args.proof, tolerance=0.0)))
    assert "answers are computed with 1 thread\n" in capsys.readouterr().out
    assert json.dumps(read_verification(verified / "bundle")) == before
    read_bundle(verified / "bundle")
    with pytest.raises(ValueError, match="was not verified"):
        read_verification(verified / "bundle-unverified")
