"""Evaluation: any checkpoints, and their weighted ensemble, on any comparisons.

In    checkpoints (by default every complete one in artifacts/stage3 but the finals), or files of
      probabilities; comparison tables
Out   artifacts/evaluate/<name>/ : probabilities.parquet (every model and order, the ensemble), scores.json
Run   just evaluate --checkpoints artifacts/stage1/gemma9b artifacts/stage1/armorm8b --name stage1
      just evaluate --checkpoints artifacts/stage3/*-final --comparisons artifacts/data/test.parquet \\
          --submission submission.csv --name test

Each model is scored in every order, then averaged over orders; the ensemble is the weighted mean of those.
Votes on comparisons that a checkpoint was trained on are refused. Unlabelled comparisons get probabilities
and no score.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
from accelerate import Accelerator

from common.console import cli, say, show_table
from common.files import file_hash, write_json
from common.inputs import Seen, checkpoint_hash, find_complete, load_comparisons, without_seen
from common.launch import start
from common.metrics import SUM_TOLERANCE, bootstrap_interval, per_row_log_loss, score, swap_consistency
from common.pairs import LABELS, is_labelled, labels_array, table_hash, write_table
from common.predict import average, open_model, open_prompter, predict_orders
from common.prompts import ORDERS, Order
from common.recipe import Execution, by_flags
from common.runs import Run
from common.token_cache import tokenise

ENSEMBLE = "ensemble"


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
    fold: int | None = None
    """Only this fold; by default fold 0 of the default comparisons, and all of named ones."""
    weights: tuple[float, ...] = ()
    """Ensemble weights, one a checkpoint, then one a file of probabilities; equal by default."""
    orders: tuple[Order, ...] = ORDERS
    """Orders in which the answers are shown."""
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


def main(args: Args) -> None:
    artifacts = args.execution.artifacts
    accelerator = start(replicas=True)
    checkpoints = args.checkpoints or (() if args.probabilities else find_complete(artifacts / "stage3"))
    num_models = len(checkpoints) + len(args.probabilities)
    if args.weights and len(args.weights) != num_models:
        raise ValueError(
            f"--weights has {len(args.weights)} numbers for {num_models} models "
            f"({' '.join(map(str, (*checkpoints, *args.probabilities)))}); give one a model, in that order"
        )
    for path in args.probabilities:
        if not path.is_file():
            raise ValueError(f"--probabilities {path} is not a file; expected a Parquet or CSV")
    weights = args.weights or (1.0,) * num_models
    frame = load_comparisons(args.comparisons or (artifacts / "data/arena55k.parquet",), args.execution)
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

    output = artifacts / "evaluate" / args.name
    names = unique_names([*checkpoints, *args.probabilities])
    run = Run.open(
        output,
        recipe={"models": names, "weights": list(weights), "orders": list(args.orders)},
        inputs={
            "checkpoints": [checkpoint_hash(path) for path in checkpoints],
            "probabilities": [file_hash(path) for path in args.probabilities],
            "comparisons": table_hash(frame),
        },
    )
    if run.is_complete:
        say(f"{output} is up to date")
    else:
        orders = {
            name: predict_checkpoint(path, frame, args, accelerator)
            for name, path in zip(names, checkpoints, strict=False)
        }
        given = zip(names[len(checkpoints) :], args.probabilities, strict=True)
        orders |= {name: {"given": read_probabilities(path, frame)} for name, path in given}
        if accelerator.is_main_process:
            finish(run, frame.sort("source", "id"), orders, weights)
    if accelerator.is_main_process:
        show_scores(args.name, run.metrics)
        if args.submission is not None:
            write_submission(args.submission, output / "probabilities.parquet", frame)
            say(f"{args.submission}: {len(frame):,} rows")


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


def read_probabilities(path: Path, frame: pl.DataFrame) -> np.ndarray:
    """Given probabilities for every comparison of `frame`, joined by id (and source, where the file has it).

    Returns:
        float32 [comparisons, 3], rows in the order of (source, id).

    Raises:
        ValueError: A column is missing, an id stands twice or not at all, or a row does not sum to 1.
    """
    try:
        table = (
            pl.read_csv(path, schema_overrides={"id": pl.String})
            if path.suffix == ".csv"
            else pl.read_parquet(path)
        )
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if missing := {"id", *LABELS} - set(table.columns):
        raise ValueError(f"{path} lacks the columns {sorted(missing)}; found {table.columns}")
    keys = ["source", "id"] if "source" in table.columns else ["id"]
    try:
        table = table.select(pl.col(keys).cast(pl.String), pl.col(LABELS).cast(pl.Float32))
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: the columns {', '.join(LABELS)} are not all numbers: {reason}") from error
    if table.select(keys).is_duplicated().any():
        first = table.filter(table.select(keys).is_duplicated())["id"][0]
        raise ValueError(f"{path} has more than one row for an id, first {first}; expected one")
    joined = (
        frame.sort("source", "id")
        .select("source", "id")
        .join(table, on=keys, how="left", maintain_order="left")
    )
    values = joined.select(LABELS).to_numpy()
    absent = joined.filter(pl.any_horizontal(pl.col(LABELS).is_null()))
    if len(absent):
        raise ValueError(
            f"{path} has no probabilities for {len(absent)} of {len(joined)} ids, first {absent['id'][0]}: "
            "was it made for other comparisons?"
        )
    if (bad := ~(np.abs(values.sum(1) - 1) <= SUM_TOLERANCE) | (values < 0).any(1)).any():
        row = joined.row(int(bad.argmax()), named=True)
        raise ValueError(
            f"{path}: the probabilities of id {row['id']} are {[row[name] for name in LABELS]}; expected "
            "numbers from 0 on that sum to 1"
        )
    return values


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
    run: Run, frame: pl.DataFrame, orders: dict[str, dict[str, np.ndarray]], weights: tuple[float, ...]
) -> None:
    """Saves probabilities by key and the scores of what is labelled."""
    run.begin()
    means = {name: average(found) for name, found in orders.items()}
    ensemble = np.average(list(means.values()), axis=0, weights=weights).astype(np.float32)
    groups = {f"{name}/{order}": values for name, found in orders.items() for order, values in found.items()}
    groups |= {f"{name}/mean": values for name, values in means.items()} | {ENSEMBLE: ensemble}
    columns = [
        pl.Series(f"{group}/{label}", values[:, i])
        for group, values in groups.items()
        for i, label in enumerate(LABELS)
    ]
    write_table(frame.select("source", "id").with_columns(columns), run.folder / "probabilities.parquet")
    labelled = frame.select(is_labelled()).to_series().to_numpy()
    scores = {}
    if labelled.any():
        labels = labels_array(frame)[labelled]
        scores = {group: score(values[labelled], labels) for group, values in groups.items()}
        for name, found in orders.items():
            if len(found) == len(ORDERS):
                pair = [found[order][labelled] for order in ORDERS]
                scores[f"{name}/mean"]["swap_consistency"] = swap_consistency(*pair)
        scores[ENSEMBLE]["slices"] = slices(frame.filter(labelled), ensemble[labelled], labels)
    write_json(run.folder / "scores.json", scores)
    run.finish(scores)


def slices(
    frame: pl.DataFrame, probabilities: np.ndarray, labels: np.ndarray
) -> dict[str, dict[str, object]]:
    """Log loss with interval by number of turns and by quarter of the answers' length in characters."""
    losses = per_row_log_loss(probabilities, labels)
    turns = frame["prompt"].list.len().to_numpy()
    answers = pl.col("response_a", "response_b").list.eval(pl.element().str.len_chars()).list.sum()
    characters = frame.select(answers).sum_horizontal().to_numpy()
    edges = np.quantile(characters, (0.25, 0.5, 0.75))
    groups = {"1 turn": turns == 1, "2 turns": turns == 2, "3 or more turns": turns >= 3}
    quarter = np.searchsorted(edges, characters, side="left")
    for i, name in enumerate(("shortest", "second", "third", "longest")):
        groups[f"{name} quarter of answers"] = quarter == i
    return {
        name: {
            "num_comparisons": int(mask.sum()),
            "log_loss": float(losses[mask].mean()),
            "interval": list(bootstrap_interval(losses[mask])),
        }
        for name, mask in groups.items()
        if mask.any()
    }


def show_scores(title: str, scores: dict[str, dict]) -> None:
    """Prints one row a model and order, then the ensemble's slices."""
    if not scores:
        say("the comparisons are unlabelled: no score")
        return
    show_table(
        title,
        ("model / order", "comparisons", "log loss", "95 % interval", "accuracy", "calibration", "swap"),
        [
            (
                group,
                f"{found['num_comparisons']:,}",
                f"{found['log_loss']:.4f}",
                "{:.4f} to {:.4f}".format(*found["log_loss_interval"]),
                f"{found['accuracy']:.3f}",
                f"{found['calibration_error']['top']:.3f}",
                f"{found['swap_consistency']['mean_absolute_difference']:.3f}"
                if "swap_consistency" in found
                else None,
            )
            for group, found in scores.items()
        ],
    )
    show_table(
        f"{title}, {ENSEMBLE} by slice",
        ("slice", "comparisons", "log loss", "95 % interval"),
        [
            (
                name,
                f"{s['num_comparisons']:,}",
                f"{s['log_loss']:.4f}",
                "{:.4f} to {:.4f}".format(*s["interval"]),
            )
            for name, s in scores[ENSEMBLE]["slices"].items()
        ],
    )


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
