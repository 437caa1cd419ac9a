"""Proves a bundle: its notebook is run as the platform would, and its answers are compared with the stages'.

In    artifacts/bundle/ and the finals that it was built from; data/test.csv, or three rows of our own
Out   artifacts/bundle/verify.json: every check, sealed; the submission
Run   just submit, which also builds it; alone: python kaggle/verify.py

The notebook runs in a virtual environment with the libraries of the manifest and nothing else, without
network, with read-only inputs, on test.csv and on a set of hard rows. Its submission is validated row by row;
for a sample, token ids must equal those of the stages, and probabilities those of the finals in fp32.
"""

import csv
import re
import shutil
import socket
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import nbformat
import numpy as np
import polars as pl
import torch

from bundle import ROOT
from bundle_manifest import MANIFEST, VERIFICATION, read_bundle, seal
from common.console import cli, say, show_table
from common.data.table import LABELS, SCHEMA, scan, swap
from common.data.votes_csv import parse_texts, read_rows
from common.files import file_hash, replacing, write_json
from common.locks import lock
from common.models import checkpoint_hash, use_threads
from common.score.predict import MAX_TOKENS, predict
from common.tokens import tokenise
from common.train.recipe import by_flags
from common.trained import open_model, open_prompter
from sandbox import NAMESPACE, SOCKET_BLOCK, isolation, make_environment, run_notebook
from stress import BadRows, write_stress_set

OWN_TEST = """\
id,prompt,response_a,response_b
1,"[""What is 2 + 2?""]","[""4""]","[""Five, I think.""]"
22,"[""Hello!"",""Tell me a joke.""]","[""Hi."",""No.""]","[""Hi!"",""Why did the chicken cross the road?""]"
333,[null],[null],"[""I did not get that.""]"
"""
"""A question, a conversation, a turn that is null: what is asked where there is no test.csv."""
TINY_PARAMETERS = 10_000_000
NUM_STRESS_ROWS, NUM_STRESS_ROWS_LARGE = 25_000, 200
SUM_TOLERANCE = 1e-6
PROBE = """
import os, socket, tempfile
for name, reach in (
    ("network", lambda: socket.create_connection(("127.0.0.1", int(os.environ["PROBE_PORT"])), timeout=10)),
    ("inputs", lambda: tempfile.TemporaryFile(dir=os.environ["BUNDLE_INPUTS"] + "/bundle")),
):
    try:
        reach().close()
        print(f"probe: {name} allowed: no error")
    except OSError as error:
        print(f"probe: {name} refused: {error.strerror or error}")
"""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What a bundle is proven on, and how strictly."""

    test: Path | None = None
    """The competition's test.csv; by default data/test.csv, or three rows of our own without it."""
    submission: Path | None = None
    """Where the notebook's answers for test.csv are kept; by default <artifacts>/submission.csv."""
    stress_rows: int | None = None
    """Rows of the generated set of hard rows; by default 25,000 for tiny models and 200 for others."""
    sample_rows: int = 64
    """Rows of each set that are compared with the stages."""
    tolerance: float = 1e-3
    """Largest difference allowed between a probability and the stages' in fp32."""

    def __post_init__(self) -> None:
        if self.sample_rows < 1 or (self.stress_rows is not None and self.stress_rows < 1):
            raise ValueError(
                f"--sample-rows is {self.sample_rows}, --stress-rows {self.stress_rows}; both need at least 1"
            )
        if self.test is not None and not self.test.is_file():
            raise ValueError(f"--test {self.test} is not a file; expected the competition's test.csv")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Proof that a bundle works where nothing else is."""

    artifacts: Path = Path("artifacts")
    """Tree of everything made; the bundle is found below it unless named."""
    bundle: Path | None = None
    """Folder of the bundle; by default <artifacts>/bundle."""
    proof: Proof


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    passed: bool
    detail: str


def main(args: Args) -> None:
    bundle = args.bundle or args.artifacts / "bundle"
    with lock(bundle):
        verify(bundle, args.proof, args.artifacts)


def verify(bundle: Path, proof: Proof, artifacts: Path) -> None:
    """Runs all checks on a bundle; writes verify.json only if all of them pass.

    Raises:
        ValueError: A check failed, each is named; or the bundle or its finals are not what the manifest says.
    """
    (bundle / VERIFICATION).unlink(missing_ok=True)
    manifest = read_bundle(bundle)
    for model in manifest["models"]:
        check_final(model)
    how = isolation()
    say(f"the stages' answers are computed with {use_threads()}")
    with tempfile.TemporaryDirectory(prefix="verify-", dir="/tmp") as name:  # short: sockets have short names
        work = Path(name)
        wanted = manifest["requirements"]["libraries"] | manifest["requirements"]["kernel"]
        python = make_environment(work / "environment", wanted, block_sockets=how == SOCKET_BLOCK)
        say(f"the notebook runs with {len(wanted)} libraries, {how}")
        checks = [Check("every byte as in the manifest", True, f"{len(manifest['files'])} files")]
        for folder, malformed in prepare_sets(work, proof, bundle):
            checks += run_and_check(folder, malformed, bundle, manifest, python, how, proof)
        read_bundle(bundle)
        checks.append(Check("bundle unchanged by running it", True, "every byte compared again"))
        submission = submission_path(proof, artifacts)
        conclude(checks, bundle, how, describe_test(proof))
        with replacing(submission) as temporary:
            shutil.copyfile(work / "test/work/submission.csv", temporary)
    say(f"{bundle} is verified; its answers for test.csv: {submission}")


def find_test(proof: Proof) -> Path | None:
    """The test.csv asked for, or the default one; None where our own rows take its place."""
    default = Path("data/test.csv")
    return proof.test or (default if default.is_file() else None)


def describe_test(proof: Proof) -> str:
    """What the notebook is run on: sha256 of test.csv, or "own rows"."""
    path = find_test(proof)
    return "own rows" if path is None else file_hash(path)


def submission_path(proof: Proof, artifacts: Path) -> Path:
    """Where the notebook's answers for test.csv are kept."""
    return proof.submission or artifacts / "submission.csv"


def check_final(model: dict) -> None:
    """ValueError where the final that a model was made from is gone or another one."""
    path = Path(model["checkpoint"])
    found = checkpoint_hash(path) if path.is_dir() else "not there"
    if found != model["checkpoint_hash"]:
        raise ValueError(
            f"{path} is {found[:12]}, but the bundle was built from {model['checkpoint_hash'][:12]} and is "
            "verified against it: put that final back, or build it again with just submit"
        )


def prepare_sets(work: Path, proof: Proof, bundle: Path) -> list[tuple[Path, BadRows]]:
    """Two folders, each with competition/test.csv and an empty work/, and the rows known to be malformed."""
    num_rows = proof.stress_rows
    if num_rows is None:
        size = sum(path.stat().st_size for path in bundle.glob("models/*/*.safetensors"))
        num_rows = NUM_STRESS_ROWS if size < 2 * TINY_PARAMETERS else NUM_STRESS_ROWS_LARGE
    for name in ("test/competition", "test/work", "stress/competition", "stress/work"):
        (work / name).mkdir(parents=True)
    test, stress = (work / name / "competition/test.csv" for name in ("test", "stress"))
    if (given := find_test(proof)) is None:
        test.write_text(OWN_TEST, encoding="utf-8")
    else:
        shutil.copyfile(given, test)
    return [(work / "test", {}), (work / "stress", write_stress_set(stress, num_rows))]


def run_and_check(
    folder: Path, malformed: BadRows, bundle: Path, manifest: dict, python: Path, how: str, proof: Proof
) -> list[Check]:
    """Runs the notebook on one set and looks at everything that came of it."""
    csv_path, work = folder / "competition/test.csv", folder / "work"
    before = file_hash(csv_path)
    notebook = nbformat.read(bundle / "notebook.ipynb", as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(PROBE))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=10).close()  # from here it can be reached
        text = run_notebook(
            notebook,
            python=python,
            inputs={"bundle": bundle, "competition": folder / "competition"},
            hidden=[ROOT / name for name in ("common", "stages", "kaggle", "data_prep")],
            work=work,
            how=how,
            variables={"PROBE_PORT": str(port), "INFER_FLAGS": "--details details.parquet"},
        )
    found = re.findall(r"^probe: (\w+) (\w+): (.*)$", text, re.MULTILINE)
    probes = {name: (result == "refused", said) for name, result, said in found}
    is_cut_off, said = probes["network"]
    checks = [Check("network cut off", is_cut_off, f"{how}: {said}")]
    if how == NAMESPACE:
        checks.append(Check("inputs read-only", *probes["inputs"]))
    checks.append(Check("test.csv unchanged", file_hash(csv_path) == before, before[:12]))
    try:
        answers = read_answers(work / "submission.csv", csv_path, manifest["prior"], malformed)
    except ValueError as error:
        checks.append(Check("submission valid", False, f"{error}"))
    else:
        told = f", {len(malformed):,} malformed with the prior" if malformed else ""
        checks.append(Check("submission valid", True, f"{len(answers):,} rows{told}"))
        checks += compare_with_stages(csv_path, answers, work / "details.parquet", manifest, proof)
    return [check._replace(name=f"{folder.name}: {check.name}") for check in checks]


def read_answers(path: Path, test: Path, prior: list[float], malformed: BadRows) -> np.ndarray:
    """A submission's probabilities, float64 [rows, classes], read by the standard library alone.

    Args:
        path: The submission.
        test: The test.csv that it answers.
        prior: What a row that cannot be read must get.
        malformed: Such rows.

    Raises:
        ValueError: Its header, an id or their order, a number, a range or a sum is wrong, or a malformed row
            has not the prior.
    """
    csv.field_size_limit(2**30)
    with test.open(encoding="utf-8-sig", newline="") as file:
        ids = [row[0] for row in csv.reader(file) if row][1:]
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    if header != ["id", *LABELS]:
        raise ValueError(f"the header is {header}")
    if [row[0] for row in rows] != ids:
        raise ValueError(f"{len(rows)} ids, expected the {len(ids)} of test.csv in order")
    answers = np.array([[float(cell) for cell in row[1:]] for row in rows])
    is_good = ((answers >= 0) & (answers <= 1)).all(axis=1)  # nor is a NaN
    is_good &= np.abs(answers.sum(axis=1) - 1) <= SUM_TOLERANCE
    if not is_good.all():
        row = int(is_good.argmin())
        raise ValueError(f"{(~is_good).sum()} rows, first id {ids[row]}: {answers[row].tolist()}")
    if wrong := [row for row in malformed if np.abs(answers[row] - prior).max() > 1e-9]:
        raise ValueError(
            f"{len(wrong)} malformed rows without the prior, first {wrong[0]}: {malformed[wrong[0]]}"
        )
    return answers


def compare_with_stages(
    csv_path: Path, answers: np.ndarray, details_path: Path, manifest: dict, proof: Proof
) -> list[Check]:
    """For a sample of rows: the bundle's token ids and answers beside those of the finals in fp32.

    The stages' way, and no line of the notebook's: rows through the token cache, a swapped order as the
    swapped table, columns put back by hand, the mean and the scaling written out.
    """
    details = scan(details_path).collect()
    details = details.gather_every(max(1, len(details) // proof.sample_rows)).head(proof.sample_rows)
    frame = sample_frame(csv_path, details["row"].to_list())
    differing, total = [], np.zeros((len(frame), len(LABELS)))
    for model in manifest["models"]:
        orders = ("given", "swapped") if model["order"] == "both" else (model["order"],)
        for order in orders:
            probabilities, input_ids = stages_answer(model, swap(frame) if order == "swapped" else frame)
            served = details[f"{model['name']}/{order}/input_ids"].to_list()
            pairs = zip(details["id"], served, input_ids, strict=True)
            where = f"{model['name']}, {order}, id"
            differing += [f"{where} {key}" for key, theirs, ours in pairs if theirs != ours]
            if order == "swapped":  # A of the swapped table is B of the original
                probabilities = probabilities[:, [1, 0, 2]]
            total += model["weight"] / len(orders) * probabilities
    expected = total / sum(model["weight"] for model in manifest["models"])
    if scaling := manifest["scaling"]:
        expected = expected ** np.array(scaling["scale"]) * np.exp(scaling["bias"])
        expected /= expected.sum(axis=1, keepdims=True)
    gaps = np.abs(answers[details["row"].to_numpy()] - expected).max(axis=1)
    worst = int(gaps.argmax())
    told = f"{len(differing)} differ, first {differing[0]}" if differing else f"{len(frame)} rows, all models"
    return [
        Check("token ids equal the stages'", not differing, told),
        Check(
            f"probabilities within {proof.tolerance:g} of the stages'",
            bool(gaps[worst] <= proof.tolerance),
            f"{len(frame)} rows, largest difference {gaps[worst]:.1e} (id {details['id'][worst]})",
        ),
    ]


def sample_frame(csv_path: Path, rows: list[int]) -> pl.DataFrame:
    """Some rows of a test.csv as comparisons, numbered in order so that sorting by id keeps it."""
    (_, header), *lines = read_rows(csv_path)
    texts = [parse_texts(header, lines[row][1])[0] for row in rows]
    numbered = [{"id": f"{i:08d}", "source": "verify", **turns} for i, turns in enumerate(texts)]
    return pl.DataFrame(numbered, schema=SCHEMA)


def stages_answer(model: dict, frame: pl.DataFrame) -> tuple[np.ndarray, list[list[int]]]:
    """A final's probabilities, float64 [comparisons, classes], and token ids, the stages' way, in fp32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = open_model(model["checkpoint"], dtype=torch.float32, device=device, ops="auto")
    prompter = open_prompter(model["checkpoint"], loaded.preference)
    with tempfile.TemporaryDirectory() as cache:
        sequences = tokenise(
            frame, prompter, formats=(model["format"],), orders=("given",), cache=Path(cache)
        )
        input_ids = [[int(token) for token in sequences[i].input_ids] for i in range(len(sequences))]
        found = predict(loaded, sequences, max_tokens=MAX_TOKENS, device=device, description=None)
    assert sequences.row.tolist() == list(range(len(frame)))
    return found.astype(np.float64), input_ids


def conclude(checks: list[Check], bundle: Path, how: str, test: str) -> None:
    """Prints every check and writes verify.json, or raises with those that failed."""
    rows = [(check.name, "passed" if check.passed else "FAILED", check.detail) for check in checks]
    show_table("verification", ("check", "result", "detail"), rows)
    if failed := [f"{check.name}: {check.detail}" for check in checks if not check.passed]:
        raise ValueError(f"{bundle} is not what the stages made: {'; '.join(failed)}")
    result = {
        "passed": True,
        "manifest_sha256": file_hash(bundle / MANIFEST),
        "isolation": how,
        "test": test,
        "date": datetime.now(UTC).date().isoformat(),
        "checks": [check._asdict() for check in checks],
    }
    write_json(bundle / VERIFICATION, {**result, "seal": seal(result)})


if __name__ == "__main__":
    cli(main, arguments=by_flags(Args))
