"""Stage 1: fine-tune a teacher on real votes (55k competition + 21k external).

In    artifacts/data/arena55k.parquet, arena33k.parquet; the published backbone
Out   artifacts/stage1/<model>/ : safetensors, tokenizer, preference.json, trained_on.parquet, metrics.jsonl,
      held_out.parquet (probabilities of the held-out fold)
Run   just stage1 gemma9b      (4 x A100-80G; hours: unmeasured)
      just stage1 gemma27b     (4 x A100-80G or more; hours: unmeasured)
      just stage1 tiny-gemma   (a CPU)
"""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from common.console import cli, say
from common.data.held_out import all_trained_on, default_tables, load_comparisons, require_labels, split_fold
from common.train import steps
from common.train.fit import fit
from common.train.launch import leave
from common.train.recipe import TINY, Execution, Recipe, Training, by_model

RECIPES = {  # docs/recipes.md says why each number is what it is
    "gemma9b": Recipe(formats=("PAB", "PAPB")),
    "gemma27b": Recipe(accumulation="stochastic"),
    "armorm8b": Recipe(
        formats=("PAB", "PAPB"), conversation_tokens=2048, comparisons_per_step=16, optimizer="stable_adamw"
    ),
    "tiny-gemma": TINY,
    "tiny-llama": TINY,
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Stage 1: fine-tune a teacher on real votes."""

    model: tyro.conf.Suppress[str]
    recipe: Recipe
    execution: Execution = field(default_factory=Execution)
    training: Training = field(default_factory=Training)
    votes: tuple[Path, ...] = ()
    """Comparison tables; by default those of arena55k.parquet and arena33k.parquet below <artifacts>/data
    that are there."""
    held_out_fold: int = 0
    """Fold that is scored and not trained on."""
    checkpoint: str | None = None
    """Weights to start from: folder, hub id or short name; by default the model's published ones."""
    output: Path | None = None
    """Folder of the run; by default <artifacts>/stage1/<model>."""
    instruction: Path | None = None
    """Text file with another instruction for the prompt; by default ours."""


def main(args: Args) -> None:
    recipe, artifacts = args.recipe, args.execution.artifacts
    output = args.output or artifacts / "stage1" / args.model
    accelerator = steps.start_training("stage1", args.model, output, args.training)

    paths = args.votes or default_tables(artifacts, "arena55k", "arena33k")
    votes = load_comparisons(paths, artifacts=artifacts, skip_bad_rows=args.execution.skip_bad_rows)
    train, held_out = split_fold(votes, args.held_out_fold)
    require_labels("stage1", train, held_out)
    parent = steps.open_parent(
        args.checkpoint or args.model, recipe, instruction=args.instruction, training=args.training
    )
    title = f"stage1 {args.model} <- {parent.name}"
    if args.training.dry_run:
        sequences = steps.tokenise_for(recipe, train, parent, args.execution, accelerator)
        steps.describe(title, recipe, RECIPES[args.model], sequences, accelerator.num_processes, whole=True)
        return leave(accelerator)
    run = steps.open_run(
        "stage1", args.model, output, recipe, parent, train=train, held_out=held_out, accelerator=accelerator
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
