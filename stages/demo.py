"""The whole method at work on tiny models: votes -> teachers -> pseudo labels -> students -> bundle.

In    nothing (a synthetic arena is drawn), or --train-csv and --test-csv in the competition's form
Out   artifacts/demo/ : the tree of the real thing, the verified bundle/, its submission.csv,
      report/report.html, summary.json
Run   just demo
      just demo --train-csv train.csv --test-csv test.csv

Every step is a script of this repository, run as printed; the two models train side by side, a thread each.
"""

import io
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import polars as pl
from rich.live import Live
from rich.text import Text

from common.console import LIVE, cli, console, say, show_table
from common.data.table import LABELS, labels_array, read_comparisons, scan, write_comparisons
from common.files import file_hash, read_json, write_json
from common.runs import Run, code_hash
from common.score.metrics import log_loss, prior_log_loss

MODELS = ("tiny-gemma", "tiny-llama")
STAGES = ("stage1", "stage2", "stage3")
SCORED_FOLD, POOL_FOLD = 0, 1
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Args:
    """The whole pipeline on tiny models, on a CPU."""

    output: Path = Path("artifacts/demo")
    """Tree of everything made; of other votes another one."""
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
    inputs = {name: getattr(args, name) for name in ("train_csv", "test_csv")}
    hashes = {name: path and file_hash(path) for name, path in inputs.items()}
    code = code_hash(*(ROOT / name for name in ("common", "stages", "data_prep", "kaggle")))
    run = Run.open(demo, recipe={}, inputs=hashes, code=code)
    if run.is_complete:
        show_summary(read_json(demo / "summary.json")["stages"])
        say(f"{demo} is up to date")
        show_results(demo)
        return
    run.begin()

    train_csv, test_csv = args.train_csv or demo / "raw/train.csv", args.test_csv or demo / "raw/test.csv"
    prepare(args, demo, train_csv)
    votes, pool = (demo / "data" / f"{name}.parquet" for name in ("votes", "pool"))
    base = ["--artifacts", demo]
    train = [*base, "--votes", votes, "--tracker", "none"]
    start = {model: ["--checkpoint", demo / "models" / model] for model in MODELS}
    together([script("stages/stage1.py", model, *train, *start[model]) for model in MODELS])
    label = ["stages/pseudo_label.py", *base, "--comparisons", pool, "--teachers"]
    teachers = [demo / "stage1" / model for model in MODELS]
    together([script(*label, teacher, "--no-merge") for teacher in teachers])
    together([script(*label, *teachers)])
    soft = [*train, "--comparisons", pool]
    together([script("stages/stage2.py", model, *soft, *start[model]) for model in MODELS])
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
    write_json(demo / "summary.json", {"stages": stages, "submission": str(demo / "submission.csv")})
    together([script("stages/report.py", *base)])
    run.finish({})
    show_summary(stages)
    show_results(demo)


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
    shown: dict[str, str] = {}  # prefix -> how far the command is, where there is a terminal
    with (
        Live(console=console, transient=True, get_renderable=lambda: live_lines(shown)),
        ThreadPoolExecutor(2) as pool,
    ):
        failures = [found for found in pool.map(run_one, commands, repeat(shown)) if found]
    if failures:
        raise ValueError("; ".join(failures))


def live_lines(running: dict[str, str]) -> Text:
    """What is under way, a line a command."""
    return Text("\n".join(list(running.values())), no_wrap=True, overflow="ellipsis")


def run_one(command: list[str], running: dict[str, str]) -> str | None:
    """Runs one command on one thread; returns what went wrong, or None.

    Args:
        command: Its words.
        running: Takes the command's line of progress while it runs.
    """
    told = shlex.join(["python", *command[1:]])
    say(f"$ {told}")
    prefix = f"  [{command[2]}] " if command[2] in MODELS else "  "
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment |= {"COLUMNS": str(console.width - len(prefix))} | (
        {LIVE: "1"} if console.is_terminal else {}
    )
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        last = ""
        for line in io.TextIOWrapper(process.stdout, encoding="utf-8", errors="replace", newline=""):
            if line.endswith("\r"):
                running[told] = f"{prefix}{line.rstrip()}"
                continue
            running.pop(told, None)
            say(f"{prefix}{line.rstrip()}")
            last = line.rstrip() or last
    running.pop(told, None)
    return f"{told} ended with status {process.returncode}: {last}" if process.returncode else None


def summarise(demo: Path, votes: Path) -> list[dict[str, object]]:
    """The ladder: every stage's models and ensemble against the prior and, where it is known, the floor."""
    frame, _ = read_comparisons([votes])
    is_scored = pl.col("fold") == SCORED_FOLD
    scored = frame.filter(is_scored).sort("source", "id")
    bounds = {
        "prior_log_loss": prior_log_loss(labels_array(frame.filter(~is_scored)), labels_array(scored)),
        "floor_log_loss": known_floor(demo / "raw/truth.parquet", scored),
    }
    rows = []
    for stage in STAGES:
        scores = read_json(demo / "evaluate" / stage / "run.json")["metrics"]
        for model in (*MODELS, "ensemble"):
            found = scores[model if model == "ensemble" else f"{model}/mean"]
            measured = {name: found[name] for name in ("log_loss", "log_loss_interval", "accuracy")}
            count = {"num_comparisons": found["num_comparisons"]}
            rows.append({"stage": stage, "model": model, **measured, **bounds, **count})
    return rows


def known_floor(truth: Path, scored: pl.DataFrame) -> float | None:
    """Log loss of the true probabilities on the votes that were drawn from them; None for real votes."""
    if not truth.is_file():
        return None
    table = scored.select("id").join(scan(truth).collect(), on="id", how="left", maintain_order="left")
    return float(log_loss(np.asarray(table.select(LABELS).to_numpy()), labels_array(scored)))


def show_summary(stages: list[dict[str, object]]) -> None:
    """Prints the ladder; the gap is that from the prior's log loss to the floor, where that is known."""
    prior, floor = (stages[0][name] for name in ("prior_log_loss", "floor_log_loss"))  # of the same votes
    rows = []
    for row in stages:
        loss, interval = row["log_loss"], "{:.4f} to {:.4f}".format(*row["log_loss_interval"])
        gap = None if floor is None else f"{(prior - loss) / (prior - floor):.0%}"
        rows.append((row["stage"], row["model"], f"{loss:.4f}", interval, f"{row['accuracy']:.3f}", gap))
    say("held-out comparisons, both orders averaged")
    bounds = f"prior {prior:.4f}" + ("" if floor is None else f", floor {floor:.4f}")
    show_table(bounds, ("stage", "model", "log loss", "95 % interval", "accuracy", "gap closed"), rows)


def show_results(demo: Path) -> None:
    """Says where everything lies."""
    for what, name in (
        ("bundle, verified", "bundle"),
        ("its submission", "submission.csv"),
        ("report", "report/report.html"),
        ("numbers", "summary.json"),
    ):
        say(f"{what}: {demo / name}")


if __name__ == "__main__":
    cli(main)
