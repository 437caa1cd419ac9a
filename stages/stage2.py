"""Stage 2: from the original weights, fine-tune on the soft labels of the teachers' ensemble alone.

In    artifacts/pseudo/ensemble/labels.parquet and the comparisons that it labels; the published backbone
Out   artifacts/stage2/<model>/ , laid out as in stage 1
Run   just stage2 gemma9b      (4 x A100-80G; hours: unmeasured)
      just stage2 tiny-gemma   (a CPU)
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import tyro

from common.console import cli, say
from common.data.held_out import (
    all_trained_on,
    default_tables,
    load_comparisons,
    require_labels,
    split_fold,
    without_content_of,
)
from common.data.table import LABEL_SUM_TOLERANCE, LABELS, is_labelled, scan
from common.train import steps
from common.train.fit import fit
from common.train.launch import leave
from common.train.recipe import TINY, Execution, Recipe, Training, by_model

RECIPES = {  # docs/recipes.md says why each number is what it is
    "gemma9b": Recipe(sliding_window="off"),
    "armorm8b": Recipe(conversation_tokens=2048, comparisons_per_step=16, optimizer="stable_adamw"),
    "tiny-gemma": TINY,
    "tiny-llama": TINY,
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Stage 2: fine-tune a student on soft labels."""

    model: tyro.conf.Suppress[str]
    recipe: Recipe
    execution: Execution = field(default_factory=Execution)
    training: Training = field(default_factory=Training)
    comparisons: tuple[Path, ...] = ()
    """Labelled pool; by default those of lmsys1m_pairs.parquet and preference_sets.parquet below
    <artifacts>/data that are there."""
    labels: Path | None = None
    """Soft labels by key; by default <artifacts>/pseudo/ensemble/labels.parquet."""
    votes: tuple[Path, ...] = ()
    """Real votes whose held-out fold is scored; by default <artifacts>/data/arena55k.parquet."""
    held_out_fold: int = 0
    """Fold of the votes that is scored."""
    checkpoint: str | None = None
    """Weights to start from: folder, hub id or short name; by default the model's published ones."""
    output: Path | None = None
    """Folder of the run; by default <artifacts>/stage2/<model>."""
    instruction: Path | None = None
    """Text file with another instruction for the prompt; by default ours."""


def main(args: Args) -> None:
    recipe, artifacts = args.recipe, args.execution.artifacts
    output = args.output or artifacts / "stage2" / args.model
    accelerator = steps.start_training("stage2", args.model, output, args.training)

    read = {"artifacts": artifacts, "skip_bad_rows": args.execution.skip_bad_rows}
    paths = args.comparisons or default_tables(artifacts, "lmsys1m_pairs", "preference_sets")
    pool = load_comparisons(paths, **read)
    labelled = join_labels(pool, args.labels or artifacts / "pseudo/ensemble/labels.parquet")
    votes = load_comparisons(args.votes or default_tables(artifacts, "arena55k"), **read)
    _, held_out = split_fold(votes, args.held_out_fold)
    train = without_content_of(labelled, held_out)
    require_labels("stage2", train, held_out)
    parent = steps.open_parent(
        args.checkpoint or args.model, recipe, instruction=args.instruction, training=args.training
    )
    title = f"stage2 {args.model} <- {parent.name}"
    if args.training.dry_run:
        sequences = steps.tokenise_for(recipe, train, parent, args.execution, accelerator)
        steps.describe(title, recipe, RECIPES[args.model], sequences, accelerator.num_processes, whole=True)
        return leave(accelerator)
    run = steps.open_run(
        "stage2", args.model, output, recipe, parent, train=train, held_out=held_out, accelerator=accelerator
    )
    if run.is_complete:
        say(f"{output} is up to date")
        return leave(accelerator)
    sequences = steps.tokenise_for(recipe, train, parent, args.execution, accelerator)
    steps.describe(title, recipe, RECIPES[args.model], sequences, accelerator.num_processes)
    trained_on = all_trained_on(train, parent.folder)

    model = steps.load_and_place(parent, recipe, args.execution, accelerator)
    steps.begin(run, sequences, recipe, accelerator)
    fit(model, sequences, recipe=recipe, training=args.training, run=run, accelerator=accelerator)
    metrics = steps.score_held_out(
        model, held_out, run, recipe, parent, args.execution, accelerator, train=train, trained_on=trained_on
    )
    steps.save(model, run, recipe, parent, accelerator, metrics=metrics, train=train, trained_on=trained_on)


def join_labels(pool: pl.DataFrame, path: Path) -> pl.DataFrame:
    """The comparisons that have soft labels, with these in place of any votes; the others are counted.

    Raises:
        ValueError: The labels cannot be read, label nothing of the pool, or are no probabilities.
    """
    try:
        labels = (
            scan(path)
            .select(pl.col("source", "id").cast(pl.String), pl.col(LABELS).cast(pl.Float64))
            .collect()
        )
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"soft labels {path} cannot be read: {reason}. Run stages/pseudo_label.py"
        ) from error
    if labels.select("source", "id").is_duplicated().any():
        raise ValueError(f"{path} labels a comparison twice; run stages/pseudo_label.py again")
    joined = pool.drop(LABELS).join(labels, on=["source", "id"], how="inner")
    if joined.is_empty():
        raise ValueError(
            f"{path} labels none of the {len(pool)} comparisons: were they made from other files?"
        )
    labelled = joined.filter(is_labelled())
    values = labelled.select(LABELS).to_numpy()
    bad = ~(np.abs(values.sum(1) - 1) <= LABEL_SUM_TOLERANCE) | (values < 0).any(1)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"{path}: the labels of {int(bad.sum()):,} comparisons are no probabilities, first "
            f"{'/'.join(labelled.select('source', 'id').row(row))} with {values[row].tolist()}; expected "
            "numbers from 0 on that sum to 1 within 0.001"
        )
    if len(joined) < len(pool):
        say(f"{len(pool) - len(joined):,} of {len(pool):,} comparisons have no soft label and are left out")
    return joined.select(pool.columns).with_columns(pl.col(LABELS).cast(pl.Float32))


if __name__ == "__main__":
    cli(main, arguments=by_model(Args, RECIPES))
