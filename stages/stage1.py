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

from common.console import cli
from common.inputs import load_comparisons, read_instruction, split_fold
from common.train.recipe import TINY, Execution, Recipe, Training, by_model
from common.train.steps import Task, finetune

RECIPES = {  # docs/recipes.md says why each number is what it is
    "gemma9b": Recipe(formats=("PAB", "PAPB")),
    "gemma27b": Recipe(max_tokens_per_micro_batch=2048, accumulation="stochastic"),
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
    """Comparison tables; by default arena55k.parquet and arena33k.parquet below <artifacts>/data."""
    held_out_fold: int = 0
    """Fold that is scored and not trained on."""
    checkpoint: str | None = None
    """Weights to start from: folder, hub id or short name; by default the model's published ones."""
    output: Path | None = None
    """By default <artifacts>/stage1/<model>."""
    instruction: Path | None = None
    """Text file with another instruction for the prompt."""


def main(args: Args) -> None:
    artifacts = args.execution.artifacts
    paths = args.votes or (artifacts / "data/arena55k.parquet", artifacts / "data/arena33k.parquet")
    votes = load_comparisons(paths, args.execution)
    train, held_out = split_fold(votes, args.held_out_fold)
    task = Task(
        stage="stage1",
        model=args.model,
        checkpoint=args.checkpoint or args.model,
        output=args.output or artifacts / "stage1" / args.model,
        recipe=args.recipe,
        table=RECIPES[args.model],
        train=train,
        held_out=held_out,
        instruction=read_instruction(args.instruction),
    )
    finetune(task, args.execution, args.training)


if __name__ == "__main__":
    cli(main, arguments=by_model(Args, RECIPES))
