"""Stage 3: fine-tune the stage 2 student on real votes again.

In    artifacts/stage2/<model>/ ; artifacts/data/arena55k.parquet, arena33k.parquet
Out   artifacts/stage3/<model>/        validation run: one fold held out and scored
      artifacts/stage3/<model>-final/  --final: all folds trained on, nothing scored
Run   just stage3 gemma9b              (4 x A100-80G; hours: unmeasured)
      just stage3 gemma9b --final
      just stage3 tiny-gemma           (a CPU)
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro

from common.console import cli, say
from common.data.held_out import all_trained_on, default_tables, load_comparisons, require_labels, split_fold
from common.train import steps
from common.train.fit import fit
from common.train.launch import leave
from common.train.recipe import TINY, Execution, Recipe, Training, by_model

RECIPES = {  # docs/recipes.md says why each number is what it is
    "gemma9b": Recipe(comparisons_per_step=400, sliding_window="off"),
    "armorm8b": Recipe(conversation_tokens=2048, comparisons_per_step=16, optimizer="stable_adamw"),
    "tiny-gemma": replace(TINY, lr=1e-3),
    "tiny-llama": replace(TINY, lr=1e-3),
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Stage 3: fine-tune a student on real votes."""

    model: tyro.conf.Suppress[str]
    recipe: Recipe
    execution: Execution = field(default_factory=Execution)
    training: Training = field(default_factory=Training)
    final: bool = False
    """Train on every fold for the bundle; there is no score, for nothing unseen is left."""
    votes: tuple[Path, ...] = ()
    """Comparison tables; by default those of arena55k.parquet and arena33k.parquet below <artifacts>/data
    that are there."""
    held_out_fold: int = 0
    """Fold that is scored and not trained on (without --final)."""
    checkpoint: str | None = None
    """The stage 2 student; by default <artifacts>/stage2/<model>."""
    output: Path | None = None
    """Folder of the run; by default <artifacts>/stage3/<model>, with -final behind it for --final."""
    instruction: Path | None = None
    """Text file with another instruction for the prompt; by default ours."""


def main(args: Args) -> None:
    recipe, artifacts = args.recipe, args.execution.artifacts
    output = args.output or artifacts / "stage3" / f"{args.model}{'-final' if args.final else ''}"
    accelerator = steps.start_training("stage3", args.model, output, args.training)

    paths = args.votes or default_tables(artifacts, "arena55k", "arena33k")
    votes = load_comparisons(paths, artifacts=artifacts, skip_bad_rows=args.execution.skip_bad_rows)
    train, held_out = (votes, None) if args.final else split_fold(votes, args.held_out_fold)
    require_labels("stage3", train, held_out)
    parent = steps.open_parent(
        args.checkpoint or str(artifacts / "stage2" / args.model),
        recipe,
        instruction=args.instruction,
        training=args.training,
    )
    title = f"stage3 {args.model} <- {parent.name}"
    if args.training.dry_run:
        sequences = steps.tokenise_for(recipe, train, parent, args.execution, accelerator)
        steps.describe(title, recipe, RECIPES[args.model], sequences, accelerator.num_processes, whole=True)
        return leave(accelerator)
    run = steps.open_run(
        "stage3", args.model, output, recipe, parent, train=train, held_out=held_out, accelerator=accelerator
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


if __name__ == "__main__":
    cli(main, arguments=by_model(Args, RECIPES))
