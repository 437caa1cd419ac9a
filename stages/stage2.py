"""Stage 2: from the original weights, fine-tune on the soft labels of the teachers' ensemble alone.

In    artifacts/pseudo/ensemble/labels.parquet and the comparisons that it labels; the published backbone
Out   artifacts/stage2/<model>/ , laid out as in stage 1
Run   just stage2 gemma9b      (4 x A100-80G; hours: unmeasured)
      just stage2 tiny-gemma   (a CPU)
"""

from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import tyro

from common.console import cli, say
from common.data.table import LABELS
from common.inputs import load_comparisons, read_instruction, split_fold, without_content_of
from common.train.recipe import TINY, Execution, Recipe, Training, by_model
from common.train.steps import Task, finetune

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
    """Labelled pool; by default lmsys1m_pairs.parquet and preference_sets.parquet below <artifacts>/data."""
    labels: Path | None = None
    """Soft labels by key; by default <artifacts>/pseudo/ensemble/labels.parquet."""
    votes: tuple[Path, ...] = ()
    """Real votes whose held-out fold is scored; by default <artifacts>/data/arena55k.parquet."""
    held_out_fold: int = 0
    """Fold of the votes that is scored."""
    checkpoint: str | None = None
    """Weights to start from: folder, hub id or short name; by default the model's published ones."""
    output: Path | None = None
    """By default <artifacts>/stage2/<model>."""
    instruction: Path | None = None
    """Text file with another instruction for the prompt."""


def main(args: Args) -> None:
    artifacts = args.execution.artifacts
    names = ("data/lmsys1m_pairs.parquet", "data/preference_sets.parquet")
    pool = load_comparisons(args.comparisons or tuple(artifacts / name for name in names), args.execution)
    labelled = join_labels(pool, args.labels or artifacts / "pseudo/ensemble/labels.parquet")
    votes = load_comparisons(args.votes or (artifacts / "data/arena55k.parquet",), args.execution)
    _, held_out = split_fold(votes, args.held_out_fold)
    task = Task(
        stage="stage2",
        model=args.model,
        checkpoint=args.checkpoint or args.model,
        output=args.output or artifacts / "stage2" / args.model,
        recipe=args.recipe,
        table=RECIPES[args.model],
        train=without_content_of(labelled, held_out),
        held_out=held_out,
        instruction=read_instruction(args.instruction),
    )
    finetune(task, args.execution, args.training)


def join_labels(pool: pl.DataFrame, path: Path) -> pl.DataFrame:
    """The comparisons that have soft labels, with these in place of any votes; the others are counted.

    Raises:
        ValueError: The labels cannot be read, or label nothing of the pool.
    """
    try:
        labels = pl.read_parquet(path, columns=["source", "id", *LABELS]).cast(
            {"source": pl.String, "id": pl.String, **dict.fromkeys(LABELS, pl.Float32)}
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
    if len(joined) < len(pool):
        say(f"{len(pool) - len(joined):,} of {len(pool):,} comparisons have no soft label and are left out")
    return joined.select(pool.columns)


if __name__ == "__main__":
    cli(main, arguments=by_model(Args, RECIPES))
