"""Evaluation: any checkpoints, and their weighted ensemble, on any comparisons.

In    checkpoints (by default every complete one in artifacts/stage3 but the finals); comparison tables.
      Or one table of votes and of probabilities made elsewhere (--table), nothing else
Out   artifacts/evaluate/<name>/ : probabilities.parquet (labels, every model and order, the ensemble),
      scores.json, reliability.png; with --calibrate also calibration.json
Run   just evaluate --checkpoints artifacts/stage1/gemma9b artifacts/stage1/armorm8b --name stage1
      just evaluate --checkpoints artifacts/stage3/*-final --comparisons artifacts/data/test.parquet \\
          --submission submission.csv --name test
      just evaluate --table votes_and_probabilities.csv --weights 2 1 --calibrate --name theirs

Each model is scored in every order and averaged over orders. The ensemble is the weighted mean of what
--ensemble-orders takes of each model; where there are votes enough, weights fitted across folds stand beside
the given ones. Votes on comparisons that a checkpoint was trained on are refused. Unlabelled comparisons get
probabilities and no score.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
from accelerate import Accelerator

from common.console import cli, say, show_table
from common.data.held_out import Seen, default_tables, load_comparisons, without_seen
from common.data.table import LABELS, ORDERS, Order, is_labelled, labels_array, scan, table_hash, write_table
from common.files import read_json, write_json
from common.models import checkpoint_hash
from common.runs import Run, find_complete
from common.score import ensemble
from common.score.calibration import MIN_LABELLED, calibrate
from common.score.metrics import ENSEMBLE, FITTED, PRIOR
from common.score.predict import MAX_TOKENS, predict_orders
from common.tokens import tokenise
from common.train.launch import leave, on_first, start
from common.train.memory import clear_prediction
from common.train.recipe import Execution, by_flags, check_least
from common.train.steps import open_trained
from common.trained import open_prompter

NUM_SLICES = 4
"""A kind that has more is not shown; scores.json and the report have all."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Scores of checkpoints and of their ensemble."""

    execution: Execution = field(default_factory=Execution)
    checkpoints: tuple[Path, ...] = ()
    """Checkpoint folders; by default every complete one in <artifacts>/stage3."""
    comparisons: tuple[Path, ...] = ()
    """Comparison tables; by default arena55k.parquet below <artifacts>/data."""
    table: Path | None = None
    """In place of these: a Parquet, CSV or JSON lines file of id, label (a, b, tie) and each model's x_a,
    x_b, x_tie."""
    fold: int | None = None
    """Only this fold; by default fold 0 of the default comparisons, and all of named ones."""
    weights: tuple[float, ...] = ()
    """Ensemble weights, one a model; equal by default."""
    orders: tuple[Order, ...] = ORDERS
    """Orders in which the answers are shown."""
    ensemble_orders: tuple[ensemble.EnsembleOrder, ...] = ()
    """Order that each model adds to the ensemble, one a model; by default both: the mean of its orders."""
    calibrate: bool = False
    """Fit temperature and vector scaling across folds; a finished evaluation is added to, not repeated."""
    seen: Seen = "refuse"
    """Comparisons that a checkpoint was trained on: refuse to go on, or leave them out, counted."""
    name: str = "evaluation"
    """Subfolder of <artifacts>/evaluate that takes the results."""
    submission: Path | None = None
    """Also write the ensemble as a competition submission, in the order of the comparisons."""
    max_tokens_per_micro_batch: int = MAX_TOKENS
    """Tokens per rank per micro-batch."""

    def __post_init__(self) -> None:
        check_least(self, max_tokens_per_micro_batch=1)
        if not self.orders or len(set(self.orders)) < len(self.orders):
            raise ValueError(f"--orders is {self.orders}, expected one or both of {ORDERS}")
        if self.weights and (min(self.weights) < 0 or sum(self.weights) <= 0):
            raise ValueError(f"--weights is {self.weights}, expected numbers >= 0 with a sum above 0")
        source, found = ("--orders", self.orders) if self.table is None else ("--table", ("given",))
        if missing := set(self.ensemble_orders) - {"both", *found}:
            raise ValueError(
                f"--ensemble-orders asks for {missing.pop()}, but {source} has only {found[0]}; say both or "
                f"{found[0]}"
            )
        given = [f"--{name}" for name in ("checkpoints", "comparisons") if getattr(self, name)]
        given += ["--fold"] * (self.fold is not None)
        if self.table is not None and given:
            raise ValueError(
                f"--table {self.table} brings its own votes and probabilities; leave out {' '.join(given)}"
            )


def main(args: Args) -> None:
    accelerator = start(replicas=True)
    checkpoints = on_first(accelerator, lambda: find_checkpoints(args)) if args.table is None else {}
    frame, given = (None, {}) if args.table is None else ensemble.read_table(args.table)
    names = [*checkpoints, *given]
    weighing = resolve_ensemble(args, names)
    if frame is None:
        frame = find_comparisons(args, tuple(checkpoints.values()))
    check_calibration(args, frame)
    run = on_first(
        accelerator,
        lambda: Run.open(
            args.execution.artifacts / "evaluate" / args.name,
            recipe={"models": names, "orders": list(args.orders), **weighing},
            inputs={
                "checkpoints": [checkpoint_hash(path) for path in checkpoints.values()],
                "probabilities": [],  # says nothing any more, but finished evaluations hold it
                "comparisons": table_hash(frame) if args.table is None else ensemble.given_hash(frame, given),
            },
        ),
    )
    if run.is_complete:
        say(f"{run.folder} is up to date")
    else:
        found = {name: {"given": values} for name, values in given.items()}
        for name, path in checkpoints.items():
            with clear_prediction(args.max_tokens_per_micro_batch, device=accelerator.device):
                found[name] = predict_checkpoint(path, frame, args, accelerator)
        if accelerator.is_main_process:
            finish(run, frame.sort("source", "id"), found, checkpoint_prior(tuple(checkpoints.values())))
    if accelerator.is_main_process:
        show_scores(args.name, run.metrics)
        if args.calibrate:
            show_calibration(args.name, find_calibration(run, frame.sort("source", "id")))
        if args.submission is not None:
            write_submission(args.submission, run.folder / "probabilities.parquet", frame)
            say(f"{args.submission}: {len(frame):,} rows")
    leave(accelerator)


def find_checkpoints(args: Args) -> dict[str, Path]:
    """Name -> checkpoint: the last part of its path, with the parent before it where two are alike.

    Raises:
        ValueError: There is none, or that does not tell them apart.
    """
    paths = args.checkpoints or find_complete(args.execution.artifacts / "stage3")
    names = [path.name for path in paths]
    names = [
        name if names.count(name) == 1 else f"{path.resolve().parent.name}-{name}"
        for name, path in zip(names, paths, strict=True)
    ]
    if len(set(names)) < len(names):
        raise ValueError(f"{', '.join(map(str, paths))}: two of these would be called the same; rename one")
    return dict(zip(names, paths, strict=True))


def resolve_ensemble(args: Args, names: list[str]) -> dict[str, list]:
    """What each model adds to the ensemble, for the recipe; a flag must have one entry a model."""
    resolved = {
        "weights": list(args.weights) or [1.0] * len(names),
        "ensemble_orders": list(args.ensemble_orders) or ["both"] * len(names),
    }
    for name, values in resolved.items():
        if len(values) != len(names):
            raise ValueError(
                f"--{name.replace('_', '-')} has {len(values)} entries for {len(names)} models "
                f"({' '.join(names)}); give one a model, in that order"
            )
    return resolved


def check_calibration(args: Args, frame: pl.DataFrame) -> None:
    """A ValueError before any prediction where --calibrate could not be answered.

    The flag is not in the recipe: it adds a file that follows from the saved probabilities.
    """
    num_labelled = int(ensemble.labelled_rows(frame).sum())
    if args.calibrate and num_labelled < MIN_LABELLED:
        raise ValueError(
            f"--calibrate has {num_labelled} labelled comparisons, at least {MIN_LABELLED} are needed (and "
            "thousands to see a gain); take more, or leave the flag out"
        )


def find_comparisons(args: Args, checkpoints: tuple[Path, ...]) -> pl.DataFrame:
    """The comparisons to score, in the order of their files: of the fold, and not seen in training."""
    artifacts = args.execution.artifacts
    paths = args.comparisons or default_tables(artifacts, "arena55k")
    frame = load_comparisons(paths, artifacts=artifacts, skip_bad_rows=args.execution.skip_bad_rows)
    fold = 0 if args.fold is None and not args.comparisons else args.fold
    if fold is not None:
        folds = sorted(frame["fold"].drop_nulls().unique().to_list())
        frame = frame.filter(pl.col("fold") == fold)
        if frame.is_empty():
            raise ValueError(f"--fold {fold} holds no comparison; folds present: {folds}")
    if frame.select(is_labelled().any()).item():
        for checkpoint in checkpoints:
            frame = without_seen(frame, checkpoint, args.seen)
    if frame.is_empty():
        raise ValueError("the checkpoints were trained on all of these comparisons: nothing is left to score")
    return frame


def predict_checkpoint(
    path: Path, frame: pl.DataFrame, args: Args, accelerator: Accelerator
) -> dict[str, np.ndarray]:
    """One checkpoint's probabilities by order, rows in the order of (source, id)."""
    model = open_trained(path, args.execution, accelerator)
    sequences = tokenise(
        frame,
        open_prompter(str(path), model.preference),
        formats=(model.preference["formats"][0],),
        orders=args.orders,
        cache=args.execution.artifacts / "tokens",
        accelerator=accelerator,
    )
    return predict_orders(
        model,
        sequences,
        max_tokens=args.max_tokens_per_micro_batch,
        device=accelerator.device,
        description=f"evaluating {path.name}",
    )


def finish(
    run: Run, frame: pl.DataFrame, orders: dict[str, dict[str, np.ndarray]], prior: list[float] | None
) -> None:
    """Saves probabilities by key, the scores of what is labelled, and the picture of how honest they are."""
    recipe = run.description["recipe"]
    run.begin()
    groups, fit = ensemble.make_groups(frame, orders, recipe["weights"], recipe["ensemble_orders"])
    table = frame.select("source", "id", *LABELS).with_columns(ensemble.group_columns(groups))
    write_table(table, run.folder / "probabilities.parquet")
    scores = ensemble.score_groups(frame, groups, prior, fit)
    write_json(run.folder / "scores.json", scores)
    if scores:
        from common.report.pictures import reliability  # scoring does not wait for matplotlib

        labelled = ensemble.labelled_rows(frame)
        labels = labels_array(frame)[labelled]
        shown = {
            name: groups[ensemble.contributed(name, order)] for name, order in ensemble_members(run).items()
        }
        if len(shown) > 1:
            shown[ENSEMBLE] = groups[ENSEMBLE]
        reliability(
            run.folder / "reliability.png", {name: (p[labelled], labels) for name, p in shown.items()}
        )
    run.finish(scores)


def checkpoint_prior(checkpoints: tuple[Path, ...]) -> list[float] | None:
    """Mean of the label frequencies that the checkpoints were trained on; None where none of them says."""
    found = [read_json(path / "preference.json").get("label_prior") for path in checkpoints]
    found = [prior for prior in found if prior]
    return np.mean(found, axis=0).tolist() if found else None


def ensemble_members(run: Run) -> dict[str, ensemble.EnsembleOrder]:
    """Model -> the order that it adds to the ensemble."""
    recipe = run.description["recipe"]
    return dict(zip(recipe["models"], recipe["ensemble_orders"], strict=True))


def find_calibration(run: Run, frame: pl.DataFrame) -> dict[str, object]:
    """Reads calibration.json of a finished run, or makes it from the saved probabilities.

    It follows from them and from the recipe, so that it can be asked for later. The ensemble's result stands
    on top, that of each model, in the order that it adds, under `per_model`.
    """
    path = run.folder / "calibration.json"
    if path.is_file():
        say(f"{path} is up to date")
        return read_json(path)
    table = scan(run.folder / "probabilities.parquet").filter(is_labelled()).collect()
    frame = frame.filter(is_labelled())
    assert table.select("source", "id").equals(frame.select("source", "id")), "the inputs' hash says so"
    labels, keys = labels_array(table), ensemble.group_keys(frame)
    members = ensemble_members(run)
    found = {
        "models": list(members),
        "weights": run.description["recipe"]["weights"],
        "orders": list(members.values()),
        "num_comparisons": len(table),
        **calibrate(ensemble.read_group(table, ENSEMBLE), labels, keys),
        "per_model": {
            name: calibrate(ensemble.read_group(table, ensemble.contributed(name, order)), labels, keys)
            for name, order in members.items()
        },
    }
    write_json(path, found)
    return found


def show_scores(title: str, scores: dict[str, dict]) -> None:
    """Prints one row a model and order, the fitted weights, and log loss (comparisons) of each slice."""
    if not scores:
        say("the comparisons are unlabelled: no score")
        return
    columns = ("model / order", "log loss", "95 % interval", "accuracy", "ECE", "swap")
    best = scores[ENSEMBLE]
    title = (
        f"{title}, {best['num_comparisons']:,} comparisons; prior: always the mean of {scores[PRIOR]['from']}"
    )
    show_table(title, columns, [score_row(group, found) for group, found in scores.items()])
    if fitted := scores.get(FITTED):
        weights = ", ".join(f"{name} {weight:.3f}" for name, weight in fitted["weights"].items())
        gain = f"gain {fitted['gain']:.4f} ({ensemble.interval(fitted['gain_interval'])})"
        say(f"{FITTED}: {gain} over the given weights, across folds; weights fitted on all: {weights}")
    for by, slices in best["slices"].items():
        if 1 < len(slices) <= NUM_SLICES:
            shown = (f"{name} {s['log_loss']:.4f} ({s['num_comparisons']:,})" for name, s in slices.items())
            say(f"{ENSEMBLE} by {by}: {', '.join(shown)}")


def score_row(group: str, found: dict) -> tuple[str | None, ...]:
    """The cells of one model and order."""
    swap = found.get("swap_consistency")
    return (
        group,
        f"{found['log_loss']:.4f}",
        ensemble.interval(found["log_loss_interval"]),
        f"{found['accuracy']:.3f}",
        f"{found['calibration_error']['top']:.3f}",
        swap and f"{swap['mean_absolute_difference']:.3f}",
    )


def show_calibration(title: str, found: dict[str, dict]) -> None:
    """Prints one row a model, and the ensemble: both scalings with their gain, and what is kept."""
    rows = []
    for name, one in {**found["per_model"], ENSEMBLE: found}.items():
        judged = [
            f"{fit['log_loss']:.4f}\n{fit['gain']:+.4f}\n({ensemble.interval(fit['gain_interval'])})"
            for fit in (one["temperature"], one["vector"])
        ]
        rows.append((name, f"{one['uncalibrated_log_loss']:.4f}", *judged, one["kept"] or "neither"))
    show_table(
        f"{title}, calibrated across folds: log loss; gain (95 % interval)",
        ("model", "without", "temperature", "vector", "kept"),
        rows,
    )


def write_submission(path: Path, probabilities: Path, frame: pl.DataFrame) -> None:
    """Writes id and the ensemble's three probabilities, each row summing to 1, in the order of `frame`."""
    if frame["id"].is_duplicated().any():
        raise ValueError("a submission needs unique ids; the comparisons come from sources that share some")
    columns = (pl.col(f"{ENSEMBLE}/{label}").cast(pl.Float64).alias(label) for label in LABELS)
    answers = scan(probabilities).select("id", *columns).collect()
    total = pl.sum_horizontal(LABELS)
    table = frame.select("id").join(answers, on="id", how="left", maintain_order="left", validate="1:1")
    write_table(table.with_columns(pl.col(label) / total for label in LABELS), path)


if __name__ == "__main__":
    cli(main, arguments=by_flags(Args))
