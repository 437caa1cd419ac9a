"""Evaluation: any checkpoints, and their weighted ensemble, on any comparisons.

In    checkpoints (by default every complete one in artifacts/stage3 but the finals), or files of
      probabilities; comparison tables. Or one table of votes and probabilities (--table), nothing else
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

from common.console import cli, say
from common.data.held_out import Seen, load_comparisons, without_seen
from common.data.table import LABELS, is_labelled, labels_array, table_hash, write_table
from common.files import file_hash, read_json, write_json
from common.models import checkpoint_hash
from common.prompts import ORDERS, Order
from common.runs import Run, find_complete
from common.score.calibration import MIN_LABELLED, calibrate
from common.score.ensemble import (
    ENSEMBLE,
    EnsembleOrder,
    check_ensemble_orders,
    checkpoint_prior,
    contributed,
    group_keys,
    labelled_rows,
    make_groups,
    probability_table,
    read_group,
    score_groups,
    show_calibration,
    show_scores,
)
from common.score.predict import predict_orders
from common.score.probability_files import read_probabilities, read_table
from common.tokens import tokenise
from common.train.launch import start
from common.train.recipe import Execution, by_flags
from common.trained import open_model, open_prompter


@dataclass(frozen=True, kw_only=True)
class Args:
    """Scores of checkpoints and of their ensemble."""

    execution: Execution = field(default_factory=Execution)
    checkpoints: tuple[Path, ...] = ()
    """Checkpoint folders; by default, without --probabilities, every complete one in <artifacts>/stage3."""
    probabilities: tuple[Path, ...] = ()
    """Parquet or CSV files of given probabilities: id, winner_model_a, winner_model_b, winner_tie."""
    comparisons: tuple[Path, ...] = ()
    """Comparison tables; by default arena55k.parquet below <artifacts>/data."""
    table: Path | None = None
    """In place of all these: a Parquet or CSV with id, a label, and of each model x: x_a, x_b, x_tie."""
    fold: int | None = None
    """Only this fold; by default fold 0 of the default comparisons, and all of named ones."""
    weights: tuple[float, ...] = ()
    """Ensemble weights, one a checkpoint, then one a file of probabilities; equal by default."""
    orders: tuple[Order, ...] = ORDERS
    """Orders in which the answers are shown."""
    ensemble_orders: tuple[EnsembleOrder, ...] = ()
    """Order that each model adds to the ensemble, one a model; by default both: the mean of its orders."""
    calibrate: bool = False
    """Fit temperature and vector scaling across folds; a finished evaluation is added to, not repeated."""
    seen: Seen = "refuse"
    """Comparisons that a checkpoint was trained on: refuse to go on, or leave them out, counted."""
    name: str = "evaluation"
    """Subfolder of <artifacts>/evaluate that takes the results."""
    submission: Path | None = None
    """Also write the ensemble as a competition submission, in the order of the comparisons."""
    max_tokens_per_micro_batch: int = 16_384
    """Tokens per rank per micro-batch."""

    def __post_init__(self) -> None:
        if not self.orders or len(set(self.orders)) < len(self.orders):
            raise ValueError(f"--orders is {self.orders}, expected one or both of {ORDERS}")
        if self.weights and (min(self.weights) < 0 or sum(self.weights) <= 0):
            raise ValueError(f"--weights is {self.weights}, expected numbers >= 0 with a sum above 0")
        others = ("checkpoints", "probabilities", "comparisons")
        given = [f"--{name}" for name in others if getattr(self, name)]
        given += ["--fold"] * (self.fold is not None)
        if self.table is not None and given:
            raise ValueError(
                f"--table {self.table} brings its own votes and probabilities; leave out {' '.join(given)}"
            )


def main(args: Args) -> None:
    accelerator = start(replicas=True)
    checkpoints, files = {}, {}
    if args.table is not None:
        frame, given = read_table(args.table)
        computed = {name: tuple(orders) for name, orders in given.items()}
    else:
        checkpoints, files = find_models(args)
        computed = dict.fromkeys(checkpoints, args.orders) | dict.fromkeys(files, ("given",))
    ensemble = resolve_ensemble(args, computed)
    if args.table is None:
        frame = find_comparisons(args, tuple(checkpoints.values()))
        given = {name: {"given": read_probabilities(path, frame)} for name, path in files.items()}
    check_calibration(args, frame)
    run = Run.open(
        args.execution.artifacts / "evaluate" / args.name,
        recipe={"models": list(computed), "orders": list(args.orders), **ensemble},
        inputs={
            "checkpoints": [checkpoint_hash(path) for path in checkpoints.values()],
            "probabilities": [file_hash(path) for path in files.values()],
            "comparisons": table_hash(frame) if args.table is None else file_hash(args.table),
        },
    )
    if run.is_complete:
        say(f"{run.folder} is up to date")
    else:
        found = {
            name: predict_checkpoint(path, frame, args, accelerator) for name, path in checkpoints.items()
        }
        if accelerator.is_main_process:
            prior = checkpoint_prior(tuple(checkpoints.values()))
            finish(run, frame.sort("source", "id"), found | given, prior)
    if accelerator.is_main_process:
        show_scores(args.name, run.metrics)
        if args.calibrate:
            show_calibration(args.name, find_calibration(run, frame.sort("source", "id")))
        if args.submission is not None:
            write_submission(args.submission, run.folder / "probabilities.parquet", frame)
            say(f"{args.submission}: {len(frame):,} rows")


def find_models(args: Args) -> tuple[dict[str, Path], dict[str, Path]]:
    """(name -> checkpoint, name -> file of probabilities)."""
    for path in args.probabilities:
        if not path.is_file():
            raise ValueError(f"--probabilities {path} is not a file; expected a Parquet or CSV")
    checkpoints = args.checkpoints
    if not checkpoints and not args.probabilities:
        checkpoints = find_complete(args.execution.artifacts / "stage3")
    names = unique_names([*checkpoints, *args.probabilities])
    files = dict(zip(names[len(checkpoints) :], args.probabilities, strict=True))
    return dict(zip(names, checkpoints, strict=False)), files


def resolve_ensemble(args: Args, computed: dict[str, tuple[str, ...]]) -> dict[str, list]:
    """What each model adds to the ensemble, for the recipe.

    Args:
        computed: Model -> the orders that there are, or will be.

    Raises:
        ValueError: A flag does not have one entry a model, or asks for an order that is not there.
    """
    names = list(computed)
    weights = args.weights or (1.0,) * len(names)
    if len(weights) != len(names):
        raise ValueError(
            f"--weights has {len(weights)} numbers for {len(names)} models ({' '.join(names)}); "
            "give one a model, in that order"
        )
    ensemble_orders = args.ensemble_orders or ("both",) * len(names)
    check_ensemble_orders(ensemble_orders, computed)
    return {"weights": list(weights), "ensemble_orders": list(ensemble_orders)}


def check_calibration(args: Args, frame: pl.DataFrame) -> None:
    """A ValueError before any prediction where --calibrate could not be answered.

    The flag is not in the recipe: it adds a file that follows from the saved probabilities.
    """
    num_labelled = int(labelled_rows(frame).sum())
    if args.calibrate and num_labelled < MIN_LABELLED:
        raise ValueError(
            f"--calibrate has {num_labelled} labelled comparisons, at least {MIN_LABELLED} are needed (and "
            "thousands to see a gain); take more, or leave the flag out"
        )


def find_comparisons(args: Args, checkpoints: tuple[Path, ...]) -> pl.DataFrame:
    """The comparisons to score, in the order of their files: of the fold, and not seen in training."""
    artifacts = args.execution.artifacts
    paths = args.comparisons or (artifacts / "data/arena55k.parquet",)
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
    model = open_model(str(path), dtype=None, device=accelerator.device, ops=args.execution.ops)
    sequences = tokenise(
        frame,
        open_prompter(str(path), model.preference),
        formats=(model.preference["formats"][0],),
        orders=args.orders,
        cache=args.execution.artifacts / "tokens",
        is_writer=accelerator.is_main_process,
        wait=accelerator.wait_for_everyone,
    )
    return predict_orders(
        model,
        sequences,
        max_tokens=args.max_tokens_per_micro_batch,
        device=accelerator.device,
        description=f"evaluating {path.name}",
    )


def unique_names(paths: list[Path]) -> list[str]:
    """The last part of each path, with the parent before it where two are alike.

    Raises:
        ValueError: That does not tell them apart.
    """
    stems = [path.stem if path.is_file() else path.name for path in paths]
    names = [
        stem if stems.count(stem) == 1 else f"{path.resolve().parent.name}-{stem}"
        for stem, path in zip(stems, paths, strict=True)
    ]
    if len(set(names)) < len(names):
        raise ValueError(f"{', '.join(map(str, paths))}: two of these would be called the same; rename one")
    return names


def finish(
    run: Run, frame: pl.DataFrame, orders: dict[str, dict[str, np.ndarray]], prior: list[float] | None
) -> None:
    """Saves probabilities by key, the scores of what is labelled, and the picture of how honest they are."""
    recipe = run.description["recipe"]
    run.begin()
    groups, fit = make_groups(frame, orders, recipe["weights"], recipe["ensemble_orders"])
    write_table(probability_table(frame, groups), run.folder / "probabilities.parquet")
    scores = score_groups(frame, groups, prior, fit)
    write_json(run.folder / "scores.json", scores)
    if scores:
        from common.report.pictures import reliability  # scoring does not wait for matplotlib

        labelled = labelled_rows(frame)
        labels = labels_array(frame)[labelled]
        shown = {name: groups[contributed(name, order)] for name, order in ensemble_members(run).items()}
        if len(shown) > 1:
            shown[ENSEMBLE] = groups[ENSEMBLE]
        reliability(
            run.folder / "reliability.png", {name: (p[labelled], labels) for name, p in shown.items()}
        )
    run.finish(scores)


def ensemble_members(run: Run) -> dict[str, EnsembleOrder]:
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
    table = pl.read_parquet(run.folder / "probabilities.parquet").filter(is_labelled())
    frame = frame.filter(is_labelled())
    assert table.select("source", "id").equals(frame.select("source", "id")), "the inputs' hash says so"
    labels, keys = labels_array(table), group_keys(frame)
    members = ensemble_members(run)
    found = {
        "models": list(members),
        "weights": run.description["recipe"]["weights"],
        "orders": list(members.values()),
        "num_comparisons": len(table),
        **calibrate(read_group(table, ENSEMBLE), labels, keys),
        "per_model": {
            name: calibrate(read_group(table, contributed(name, order)), labels, keys)
            for name, order in members.items()
        },
    }
    write_json(path, found)
    return found


def write_submission(path: Path, probabilities: Path, frame: pl.DataFrame) -> None:
    """Writes id and the ensemble's three probabilities, each row summing to 1, in the order of `frame`."""
    if frame["id"].is_duplicated().any():
        raise ValueError("a submission needs unique ids; the comparisons come from sources that share some")
    ensemble = pl.read_parquet(probabilities).select(
        "id", *(pl.col(f"{ENSEMBLE}/{label}").cast(pl.Float64).alias(label) for label in LABELS)
    )
    total = pl.sum_horizontal(LABELS)
    table = (
        frame.select("id")
        .join(ensemble, on="id", how="left", maintain_order="left", validate="1:1")
        .with_columns(pl.col(label) / total for label in LABELS)
    )
    write_table(table, path)


if __name__ == "__main__":
    cli(main, arguments=by_flags(Args))
