"""Numbers that a change of shape must not move, as one JSON object: run it before and after, and compare.

In    artifacts/demo, finished (just demo)
Out   stdout: sha256 of the tiny models' weights after 40 steps (one process; two under FSDP2), of the demo's
      summary and submission, and of the four data tables made from raw files drawn out of the demo's votes
Run   python tests/recording.py > recording.json      (about two minutes)

Scripts are called by their command lines alone, so that the same file runs in any version of the repository.
"""

import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import polars as pl
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "artifacts/demo"
NUM_TRAIN, NUM_HELD_OUT = 320, 40
FSDP = (
    *("-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/fsdp_9b.yaml"),
    *("--num_processes", "2", "--num_machines", "1", "--main_process_port", "29533", "tests/shim.py"),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {
            f"demo/{name}": sha256((DEMO / name).read_bytes()) for name in ("summary.json", "submission.csv")
        }
        print(json.dumps(found | weights(folder) | tables(folder), indent=2))


def weights(folder: Path) -> dict[str, str]:
    """Both families, alone and sharded over two processes, after 40 steps of 8 comparisons."""
    votes = pl.read_parquet(DEMO / "data/votes.parquet").sort("source", "id")
    parts = (
        votes.filter(pl.col("fold") != 0).head(NUM_TRAIN),
        votes.filter(pl.col("fold") == 0).head(NUM_HELD_OUT),
    )
    pl.concat(parts).write_parquet(folder / "votes.parquet")
    found = {}
    for model in ("tiny-gemma", "tiny-llama"):
        for how, words in (("1 process", ()), ("2 processes, FSDP2", FSDP)):
            output = folder / f"{model}-{len(words)}"
            flags = ("--artifacts", folder, "--votes", folder / "votes.parquet", "--output", output)
            run(*words, "stages/stage1.py", model, *flags, "--tracker", "none", sharded=bool(words))
            tensors = sorted(load_file(output / "model.safetensors").items())
            content = b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in tensors)
            steps = len((output / "metrics.jsonl").read_text().splitlines())
            found[f"weights/{model}, {steps} steps, {how}"] = sha256(content)
    return found


def tables(folder: Path) -> dict[str, str]:
    """The four scripts of data_prep on small raw files of the forms that the sources are published in."""
    with (DEMO / "raw/train.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for _, row in zip(range(1500), csv.DictReader(file), strict=False)]
    jobs = {
        "competition": (DEMO / "raw/train.csv", ()),
        "external33k": (lines(folder / "votes33k.jsonl", map(vote, rows)), ()),
        "lmsys1m_pairs": (
            lines(folder / "chats.jsonl", (one for row in rows for one in conversations(row))),
            (),
        ),
        "preference_sets": (lines(folder / "sets.jsonl", map(preference, rows)), ()),
    }
    found = {}
    for script, (path, flags) in jobs.items():
        output = folder / f"{script}.parquet"
        run(f"data_prep/{script}.py", "--input", path, "--output", output, *flags, "--skip-bad-rows")
        found[f"table/{script}"] = sha256(repr(pl.read_parquet(output).rows()).encode())
    return found


def chat(row: dict[str, str], side: str) -> list[dict[str, str]]:
    """The conversation with one of the two models; nulls stay."""
    turns = zip(json.loads(row["prompt"]), json.loads(row[f"response_{side}"]), strict=True)
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def vote(row: dict[str, str]) -> dict[str, object]:
    """The original form of the 33k votes."""
    winner = next(name for name in ("model_a", "model_b", "tie") if row[f"winner_{name}"] == "1")
    models = {name: row[name] for name in ("model_a", "model_b")}
    chats = {f"conversation_{side}": chat(row, side) for side in "ab"}
    return {"question_id": row["id"], **models, "winner": winner, **chats}


def conversations(row: dict[str, str]) -> list[dict[str, object]]:
    """Both answers as single conversations, as in lmsys-chat-1m."""
    return [
        {"conversation_id": row["id"] + side, "model": row[f"model_{side}"], "conversation": chat(row, side)}
        for side in "ab"
    ]


def preference(row: dict[str, str]) -> dict[str, object]:
    """A preference set's row: A is chosen."""
    scores = {"chosen_score": 2, "rejected_score": 0.5}
    return {"chosen": chat(row, "a"), "rejected": chat(row, "b"), **scores}


def lines(path: Path, rows) -> Path:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(*words: object, sharded: bool = False) -> None:
    """One command on one thread; what it prints is shown if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"ACCELERATE_TORCH_DEVICE": "cpu"} if sharded else {}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    main()
