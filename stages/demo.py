"""The whole method at work on tiny models: votes -> teachers -> pseudo labels -> students -> bundle.

In    nothing (a synthetic arena is drawn), or --train-csv and --test-csv in the competition's form
Out   artifacts/demo/ : the tree of the real thing, the verified bundle/, its submission.csv,
      report/report.html, summary.json
Run   just demo
      just demo --train-csv train.csv --test-csv test.csv

Every step is a script of this repository, run as printed; the two models train side by side, a thread each.
"""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from common.console import cli, say, show_table
from common.data.table import LABELS, labels_array, read_comparisons, write_comparisons
from common.files import file_hash, read_json, text_hash, write_json
from common.score.metrics import log_loss, prior_log_loss

MODELS = ("tiny-gemma", "tiny-llama")
STAGES = ("stage1", "stage2", "stage3")
SCORED_FOLD, POOL_FOLD = 0, 1
CODE = (".py", ".ipynb", ".j2")
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Args:
    """The whole pipeline on tiny models, on a CPU."""

    output: Path = Path("artifacts/demo")
    """Tree of everything made. A demo of other votes that lies there is moved aside."""
    train_csv: Path | None = None
    """Real votes (the competition's train.csv): fold 0 scores, fold 1 is the pool, the rest teach."""
    test_csv: Path | None = None
    """The competition's test.csv."""

    def __post_init__(self) -> None:
        if (self.train_csv is None) != (self.test_csv is None):
            raise ValueError(
                "--train-csv and --test-csv go together: give both, or neither for synthetic votes"
            )
        for path in (self.train_csv, self.test_csv):
            if path is not None and not path.is_file():
                raise ValueError(f"{path} is not a file")


def main(args: Args) -> None:
    demo = args.output
    identity = describe_inputs(args)
    move_aside_another_demo(demo, identity)
    done = demo / "summary.json"
    if (demo / "demo.json").is_file() and read_json(demo / "demo.json") == {**identity, "complete": True}:
        show_summary(read_json(done)["stages"])
        say(f"{demo} is up to date")
        show_results(demo)
        return
    write_json(demo / "demo.json", {**identity, "complete": False})

    train_csv, test_csv = args.train_csv or demo / "raw/train.csv", args.test_csv or demo / "raw/test.csv"
    prepare(args, demo, train_csv)
    votes, pool = (demo / "data" / f"{name}.parquet" for name in ("votes", "pool"))
    base = ["--artifacts", demo]
    train = [*base, "--votes", votes, "--tracker", "none"]
    together([script("stages/stage1.py", model, *train) for model in MODELS])
    label = ["stages/pseudo_label.py", *base, "--comparisons", pool, "--teachers"]
    teachers = [demo / "stage1" / model for model in MODELS]
    together([script(*label, teacher, "--no-merge") for teacher in teachers])
    together([script(*label, *teachers)])
    together([script("stages/stage2.py", model, *train, "--comparisons", pool) for model in MODELS])
    stage3 = [script("stages/stage3.py", model, *train) for model in MODELS]
    together([*stage3, *([*command, "--final"] for command in stage3)])
    as_served = ["--weights", 2, 1, "--ensemble-orders", "given", "swapped", "--calibrate"]
    together(
        [
            *(evaluation(stage, stage, demo, votes) for stage in STAGES),
            [*evaluation("stage3", "served", demo, votes), *map(str, as_served)],
        ]
    )
    together([script("kaggle/submit.py", *base, "--test", test_csv, "--evaluation", "served")])
    stages = summarise(demo, votes)
    write_json(done, {"stages": stages, "submission": str(demo / "submission.csv")})
    together([script("stages/report.py", *base)])
    write_json(demo / "demo.json", {**identity, "complete": True})
    show_summary(stages)
    show_results(demo)


def describe_inputs(args: Args) -> dict[str, object]:
    """What a demo is made from: the votes and the code."""
    parts = ("common", "stages", "data_prep", "kaggle")
    code = sorted(path for part in parts for path in (ROOT / part).rglob("*") if path.suffix in CODE)
    return {
        "train_csv": args.train_csv and file_hash(args.train_csv),
        "test_csv": args.test_csv and file_hash(args.test_csv),
        "code": text_hash(*(file_hash(path) for path in code)),
    }


def move_aside_another_demo(demo: Path, identity: dict[str, object]) -> None:
    """Renames a demo of other votes that lies in `demo`, and brings back one of these votes."""
    if not (demo / "demo.json").is_file():
        if demo.is_dir() and any(demo.iterdir()):
            raise ValueError(
                f"{demo} holds files that no demo made; choose another --output or move them away"
            )
        return
    here = aside(demo, read_json(demo / "demo.json"))
    ours = aside(demo, identity)
    if here == ours:
        return
    if here.exists():
        raise ValueError(
            f"{demo} holds other votes than asked for, and {here} exists already; move one of them"
        )
    demo.rename(here)
    say(f"{demo} held a demo of other votes; it is now {here}")
    if ours.exists():
        ours.rename(demo)


def aside(demo: Path, identity: dict) -> Path:
    """Where a demo of certain votes waits while another one takes its place."""
    votes = identity["train_csv"]
    return demo.with_name(f"{demo.name}-synthetic" if votes is None else f"{demo.name}-votes-{votes[:8]}")


def prepare(args: Args, demo: Path, train_csv: Path) -> None:
    """Raw files -> votes and pool, and the two tiny checkpoints."""
    arena = ["data_prep/demo_arena.py", "--output", demo]
    together([script(*arena, *(["--train-csv", args.train_csv] if args.train_csv else []))])
    data = demo / "data"
    tables = [("arena", train_csv, 5)]
    if args.train_csv is None:
        tables.append(("pool", demo / "raw/pool.csv", 0))
    together([read_csv(path, data / f"{name}.parquet", name, folds) for name, path, folds in tables])
    arena_votes, _ = read_comparisons([data / "arena.parquet"])
    if args.train_csv is not None:
        in_pool = pl.col("fold") == POOL_FOLD
        unlabelled = (pl.lit(None, dtype=pl.Float32).alias(name) for name in LABELS)
        write_comparisons(arena_votes.filter(in_pool).with_columns(*unlabelled), data / "pool.parquet")
        arena_votes = arena_votes.filter(~in_pool)
    write_comparisons(arena_votes, data / "votes.parquet")


def script(path: str, *arguments: object) -> list[str]:
    """The command line of one of our scripts."""
    return [sys.executable, path, *(str(argument) for argument in arguments)]


def read_csv(path: Path, output: Path, source: str, folds: int) -> list[str]:
    """The command that turns a CSV in the competition's form into a comparison table."""
    flags = ["--input", path, "--output", output, "--folds", folds, "--source", source]
    return script("data_prep/competition.py", *flags)


def evaluation(stage: str, name: str, demo: Path, votes: Path) -> list[str]:
    """The command that scores a stage's models and their ensemble on the scored fold."""
    which = ["--artifacts", demo, "--comparisons", votes, "--fold", SCORED_FOLD, "--name", name]
    checkpoints = [demo / stage / model for model in MODELS]
    return script("stages/evaluate.py", *which, "--checkpoints", *checkpoints)


def together(commands: list[list[str]]) -> None:
    """Runs commands, two at a time, and prints their lines as they come.

    Raises:
        ValueError: One of them failed; its command and its last lines are named.
    """
    with ThreadPoolExecutor(2) as pool:
        failures = [found for found in pool.map(run_one, commands) if found]
    if failures:
        raise ValueError("; ".join(failures))


def run_one(command: list[str]) -> str | None:
    """Runs one command on one thread; returns what went wrong, or None."""
    shown = shlex.join(["python", *command[1:]])
    say(f"$ {shown}")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "PYTHONUNBUFFERED": "1"}
    prefix = f"[{command[2]}] " if command[2] in MODELS else ""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        last = ""
        for line in process.stdout:
            say(f"  {prefix}{line.rstrip()}")
            last = line.rstrip() or last
    return f"{shown} ended with status {process.returncode}: {last}" if process.returncode else None


def summarise(demo: Path, votes: Path) -> list[dict[str, object]]:
    """The ladder: every stage's models and ensemble against the prior and, where it is known, the floor."""
    frame, _ = read_comparisons([votes])
    is_scored = pl.col("fold") == SCORED_FOLD
    scored = frame.filter(is_scored).sort("source", "id")
    train_labels = labels_array(frame.filter(~is_scored))
    floor = known_floor(demo / "raw/truth.parquet", scored)
    rows = []
    for stage in STAGES:
        scores = read_json(demo / "evaluate" / stage / "run.json")["metrics"]
        for group, found in scores.items():
            model = group.removesuffix("/mean")
            if model != "ensemble" and not group.endswith("/mean"):
                continue
            rows.append(
                {
                    "stage": stage,
                    "model": model,
                    "log_loss": found["log_loss"],
                    "log_loss_interval": found["log_loss_interval"],
                    "accuracy": found["accuracy"],
                    "prior_log_loss": prior_log_loss(train_labels, labels_array(scored)),
                    "floor_log_loss": floor,
                    "num_comparisons": found["num_comparisons"],
                }
            )
    return rows


def known_floor(truth: Path, scored: pl.DataFrame) -> float | None:
    """Log loss of the true probabilities on the votes that were drawn from them; None for real votes."""
    if not truth.is_file():
        return None
    table = scored.select("id").join(pl.read_parquet(truth), on="id", how="left", maintain_order="left")
    return float(log_loss(np.asarray(table.select(LABELS).to_numpy()), labels_array(scored)))


def show_summary(stages: list[dict[str, object]]) -> None:
    """Prints the ladder."""
    show_table(
        "held-out comparisons, both orders averaged",
        ("stage", "model", "log loss", "95 % interval", "accuracy", "prior", "floor", "gap closed"),
        [
            (
                row["stage"],
                row["model"],
                f"{row['log_loss']:.4f}",
                "{:.4f} to {:.4f}".format(*row["log_loss_interval"]),
                f"{row['accuracy']:.3f}",
                f"{row['prior_log_loss']:.4f}",
                None if row["floor_log_loss"] is None else f"{row['floor_log_loss']:.4f}",
                None if row["floor_log_loss"] is None else f"{gap_closed(row):.0%}",
            )
            for row in stages
        ],
    )


def show_results(demo: Path) -> None:
    """Says where everything lies."""
    for what, name in (
        ("bundle, verified", "bundle"),
        ("its submission", "submission.csv"),
        ("report", "report/report.html"),
        ("numbers", "summary.json"),
    ):
        say(f"{what}: {demo / name}")


def gap_closed(row: dict[str, object]) -> float:
    """Share of the way from the prior's log loss to the floor."""
    return (row["prior_log_loss"] - row["log_loss"]) / (row["prior_log_loss"] - row["floor_log_loss"])


if __name__ == "__main__":
    cli(main)
