"""Proves a bundle: its notebook is run as the platform would, and its answers are compared with the stages'.

In    artifacts/bundle/ and the finals that it was built from; data/test.csv, or three rows of our own
Out   artifacts/bundle/verify.json: every check, sealed; the submission
Run   just submit, which also builds it; alone: python kaggle/verify.py

The notebook runs in a virtual environment with the libraries of the manifest and nothing else, without
network, with read-only inputs, on test.csv and on a set of hard rows. Its submission is validated row by row;
for a sample, token ids must equal those of the stages, and probabilities those of the finals in fp32.
"""

import csv
import json
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
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
from common.data.table import LABELS, SCHEMA, swap
from common.data.votes_csv import REQUIRED, parse_texts, read_rows
from common.files import file_hash, replacing, write_json
from common.models import checkpoint_hash
from common.score.predict import predict
from common.tokens import tokenise
from common.trained import open_model, open_prompter
from sandbox import NAMESPACE, SOCKET_BLOCK, isolation, make_environment, run_notebook
from stress import write_stress_set

OWN_TEST = (  # a question, a conversation, a turn that is null: what a test.csv without a file of ours holds
    ("1", ["What is 2 + 2?"], ["4"], ["Five, I think."]),
    ("22", ["Hello!", "Tell me a joke."], ["Hi.", "No."], ["Hello!", "Why did the chicken cross the road?"]),
    ("333", [None], [None], ["I did not get that."]),
)
TINY_PARAMETERS = 10_000_000
NUM_STRESS_ROWS, NUM_STRESS_ROWS_LARGE = 25_000, 200
SUM_TOLERANCE = 1e-6
PROBE = """
import os, socket
try:
    socket.create_connection(("127.0.0.1", int(os.environ["PROBE_PORT"])), timeout=10).close()
    print("probe: network reachable")
except OSError as error:
    print("probe: network refused:", error.strerror or error)
try:
    open(os.environ["BUNDLE_INPUTS"] + "/bundle/probe", "w").close()
    print("probe: inputs writable")
except OSError as error:
    print("probe: inputs refused:", error.strerror or error)
"""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Proof that a bundle works where nothing else is."""

    artifacts: Path = Path("artifacts")
    """Tree of everything made; the bundle is found below it unless named."""
    bundle: Path | None = None
    """By default <artifacts>/bundle."""
    test: Path | None = None
    """The competition's test.csv; by default data/test.csv, or three rows of our own without it."""
    submission: Path | None = None
    """Where the notebook's answers for test.csv are kept; by default <artifacts>/submission.csv."""
    stress_rows: int | None = None
    """Rows of the generated set; by default 25,000 for tiny models and 200 for others."""
    sample_rows: int = 64
    """Rows of each set that are compared with the stages."""
    tolerance: float = 1e-3
    """Largest difference allowed between a probability and the stages' in fp32."""

    def __post_init__(self) -> None:
        if self.sample_rows < 1 or (self.stress_rows is not None and self.stress_rows < 1):
            raise ValueError(
                f"--sample-rows is {self.sample_rows}, --stress-rows {self.stress_rows}; both need at least 1"
            )


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    passed: bool
    detail: str


def main(args: Args) -> None:
    verify(args, args.bundle or args.artifacts / "bundle")


def verify(args: Args, bundle: Path) -> None:
    """Runs all checks on a bundle; writes verify.json only if all of them pass.

    Raises:
        ValueError: A check failed, each is named; or the bundle or its finals are not what the manifest says.
    """
    (bundle / VERIFICATION).unlink(missing_ok=True)
    manifest = read_bundle(bundle)
    for model in manifest["models"]:
        check_final(model)
    how = isolation()
    with tempfile.TemporaryDirectory(prefix="verify-", dir="/tmp") as name:  # short: sockets have short names
        work = Path(name)
        wanted = {**manifest["requirements"]["libraries"], **manifest["requirements"]["kernel"]}
        python = make_environment(work / "environment", wanted, block_sockets=how == SOCKET_BLOCK)
        say(f"the notebook runs with {len(wanted)} libraries, {how}")
        test, stress = prepare_sets(work, args, bundle)
        checks = [Check("every byte as in the manifest", True, f"{len(manifest['files'])} files")]
        for folder, malformed in (test, stress):
            checks += run_and_check(folder, malformed, bundle, manifest, python, how, args)
        read_bundle(bundle)
        checks.append(Check("bundle unchanged by running it", True, "every byte compared again"))
        submission = submission_path(args)
        conclude(checks, bundle, how, describe_test(args))
        with replacing(submission) as temporary:
            shutil.copyfile(test[0] / "work/submission.csv", temporary)
    say(f"{bundle} is verified; its answers for test.csv: {submission}")


def find_test(args: Args) -> Path | None:
    """The test.csv asked for, or the default one; None where our own rows take its place.

    Raises:
        ValueError: --test is not a file.
    """
    if args.test is not None and not args.test.is_file():
        raise ValueError(f"--test {args.test} is not a file; expected the competition's test.csv")
    default = Path("data/test.csv")
    return args.test or (default if default.is_file() else None)


def describe_test(args: Args) -> str:
    """What the notebook is run on: sha256 of test.csv, or "own rows"."""
    path = find_test(args)
    return "own rows" if path is None else file_hash(path)


def submission_path(args: Args) -> Path:
    """Where the notebook's answers for test.csv are kept."""
    return args.submission or args.artifacts / "submission.csv"


def check_final(model: dict) -> None:
    """ValueError where the final that a model was made from is gone or another one."""
    path = Path(model["checkpoint"])
    if not path.is_dir():
        raise ValueError(
            f"{path} is not there: a bundle is verified against the final that it was built from; put it "
            "back, or build the bundle again"
        )
    if (found := checkpoint_hash(path)) != model["checkpoint_hash"]:
        raise ValueError(
            f"{path} is {found[:12]}, but the bundle was built from {model['checkpoint_hash'][:12]}: build "
            "it again with just submit"
        )


def prepare_sets(work: Path, args: Args, bundle: Path) -> list[tuple[Path, dict[int, str] | None]]:
    """Two folders, each with competition/test.csv and an empty work/; the malformed rows, where known."""
    test, num_rows = find_test(args), args.stress_rows
    if num_rows is None:
        size = sum(path.stat().st_size for path in bundle.glob("models/*/*.safetensors"))
        num_rows = NUM_STRESS_ROWS if size < 2 * TINY_PARAMETERS else NUM_STRESS_ROWS_LARGE
    folders = [work / "test", work / "stress"]
    for folder in folders:
        (folder / "competition").mkdir(parents=True)
        (folder / "work").mkdir()
    if test is None:
        with (folders[0] / "competition/test.csv").open("w", encoding="utf-8", newline="") as file:
            rows = [(key, *map(json.dumps, turns)) for key, *turns in OWN_TEST]
            csv.writer(file).writerows([REQUIRED, *rows])
    else:
        shutil.copyfile(test, folders[0] / "competition/test.csv")
    malformed = write_stress_set(folders[1] / "competition/test.csv", num_rows)
    return [(folders[0], None), (folders[1], malformed)]


def run_and_check(
    folder: Path,
    malformed: dict[int, str] | None,
    bundle: Path,
    manifest: dict,
    python: Path,
    how: str,
    args: Args,
) -> list[Check]:
    """Runs the notebook on one set and looks at everything that came of it."""
    csv_path, work = folder / "competition/test.csv", folder / "work"
    before = file_hash(csv_path)
    notebook = nbformat.read(bundle / "notebook.ipynb", as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(PROBE))
    with listening() as port:
        text = run_notebook(
            notebook,
            python=python,
            inputs={"bundle": bundle, "competition": folder / "competition"},
            hidden=[ROOT / name for name in ("common", "stages", "kaggle", "data_prep")],
            work=work,
            how=how,
            variables={"PROBE_PORT": str(port), "INFER_FLAGS": "--details details.parquet"},
        )
    probes = {line.split(": ")[1].split()[0]: line for line in text.splitlines() if line.startswith("probe:")}
    checks = [Check("network cut off", "refused" in probes["network"], f"{how}: {said(probes['network'])}")]
    if how == NAMESPACE:
        checks.append(Check("inputs read-only", "refused" in probes["inputs"], said(probes["inputs"])))
    unchanged = file_hash(csv_path) == before and not list(bundle.glob("probe"))
    checks.append(Check("test.csv unchanged", unchanged, before[:12]))
    rows = read_as_text(csv_path)
    answers, check = check_submission(work / "submission.csv", [row[0] for row in rows], manifest, malformed)
    checks.append(check)
    if check.passed:
        checks += compare_with_stages(csv_path, answers, work / "details.parquet", manifest, args)
    return [check._replace(name=f"{folder.name}: {check.name}") for check in checks]


def said(probe: str) -> str:
    """What a probe got to hear: "probe: network refused: Timed out" -> "Timed out"."""
    return probe.split(": ")[-1]


@contextmanager
def listening() -> Iterator[int]:
    """A port of this machine that can be connected to, which is shown first."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=8)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
        yield port


def read_as_text(path: Path) -> list[list[str]]:
    """The rows of a CSV below its header, by the standard library alone."""
    csv.field_size_limit(2**30)
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [row for row in csv.reader(file) if row][1:]


def check_submission(
    path: Path, ids: list[str], manifest: dict, malformed: dict[int, str] | None
) -> tuple[np.ndarray, Check]:
    """Header, ids and their order, numbers, range, sums; the prior in rows that cannot be read."""
    name = "submission valid"
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    if header != ["id", *LABELS]:
        return np.empty(0), Check(name, False, f"the header is {header}")
    found = [row[0] for row in rows]
    if found != ids:
        return np.empty(0), Check(
            name, False, f"{len(found)} ids, expected the {len(ids)} of test.csv in order"
        )
    answers = np.array([[float(cell) for cell in row[1:]] for row in rows])
    sums = answers.sum(axis=1)
    bad = ~np.isfinite(answers).all(1) | (answers < 0).any(1) | (answers > 1).any(1)
    bad |= ~(np.abs(sums - 1) <= SUM_TOLERANCE)
    if bad.any():
        row = int(bad.argmax())
        return answers, Check(name, False, f"{bad.sum()} rows, first id {ids[row]}: {answers[row].tolist()}")
    wrong = [row for row in malformed or () if np.abs(answers[row] - manifest["prior"]).max() > 1e-9]
    if wrong:
        detail = f"{len(wrong)} malformed rows without the prior, first {wrong[0]}: {malformed[wrong[0]]}"
        return answers, Check(name, False, detail)
    detail = f"{len(ids):,} rows" + (f", {len(malformed):,} malformed with the prior" if malformed else "")
    return answers, Check(name, True, detail)


def compare_with_stages(
    csv_path: Path, answers: np.ndarray, details_path: Path, manifest: dict, args: Args
) -> list[Check]:
    """For a sample of rows: the bundle's token ids and answers beside those of the finals in fp32.

    The stages' way, and no line of the notebook's: rows through the token cache, a swapped order as the
    swapped table, columns put back by hand, the mean and the scaling written out.
    """
    details = pl.read_parquet(details_path)
    details = details.gather_every(max(1, len(details) // args.sample_rows)).head(args.sample_rows)
    frame = sample_frame(csv_path, details["row"].to_list())
    differing, total = [], np.zeros((len(frame), len(LABELS)))
    for model in manifest["models"]:
        orders = ("given", "swapped") if model["order"] == "both" else (model["order"],)
        for order in orders:
            probabilities, input_ids = stages_answer(model, swap(frame) if order == "swapped" else frame)
            served = details[f"{model['name']}/{order}/input_ids"].to_list()
            differing += [
                f"{model['name']}, {order}, id {key}"
                for key, theirs, ours in zip(details["id"], served, input_ids, strict=True)
                if theirs != ours
            ]
            if order == "swapped":  # A of the swapped table is B of the original
                probabilities = probabilities[:, [1, 0, 2]]
            total += model["weight"] / len(orders) * probabilities
    expected = total / sum(model["weight"] for model in manifest["models"])
    if scaling := manifest["scaling"]:
        expected = expected ** np.array(scaling["scale"]) * np.exp(scaling["bias"])
        expected /= expected.sum(axis=1, keepdims=True)
    gaps = np.abs(answers[details["row"].to_numpy()] - expected).max(axis=1)
    worst = int(gaps.argmax())
    which = (
        f"{len(differing)} differ, first {differing[0]}" if differing else f"{len(frame)} rows, all models"
    )
    return [
        Check("token ids equal the stages'", not differing, which),
        Check(
            f"probabilities within {args.tolerance:g} of the stages'",
            bool(gaps[worst] <= args.tolerance),
            f"{len(frame)} rows, largest difference {gaps[worst]:.1e} (id {details['id'][worst]})",
        ),
    ]


def sample_frame(csv_path: Path, rows: list[int]) -> pl.DataFrame:
    """Some rows of a test.csv as comparisons, numbered in order so that sorting by id keeps it."""
    wanted, found = set(rows), []
    with closing(read_rows(csv_path)) as lines:
        _, header = next(lines)
        for row, (_, cells) in enumerate(lines):
            if row in wanted:
                texts, _ = parse_texts(header, cells)
                found.append({"id": f"{len(found):08d}", "source": "verify", **texts})
    return pl.DataFrame(
        found, schema={name: kind for name, kind in SCHEMA.items() if name in found[0]}
    ).select(
        pl.col(name) if name in found[0] else pl.lit(None, kind).alias(name) for name, kind in SCHEMA.items()
    )


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
        found = predict(loaded, sequences, max_tokens=16_384, device=device, description=None)
    assert sequences.row.tolist() == list(range(len(frame)))
    return found.astype(np.float64), input_ids


def conclude(checks: list[Check], bundle: Path, how: str, test: str) -> None:
    """Prints every check and writes verify.json, or raises with those that failed."""
    show_table(
        "verification",
        ("check", "result", "detail"),
        [(check.name, "passed" if check.passed else "FAILED", check.detail) for check in checks],
    )
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
    cli(main)
