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

from common.console import cli
from common.inputs import load_comparisons, read_instruction, split_fold
from common.train.recipe import TINY, Execution, Recipe, Training, by_model
from common.train.steps import Task, finetune

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
    """Comparison tables; by default arena55k.parquet and arena33k.parquet below <artifacts>/data."""
    held_out_fold: int = 0
    """Fold that is scored and not trained on (without --final)."""
    checkpoint: str | None = None
    """The stage 2 student; by default <artifacts>/stage2/<model>."""
    output: Path | None = None
    """By default <artifacts>/stage3/<model>, with -final behind it for --final."""
    instruction: Path | None = None
    """Text file with another instruction for the prompt."""


def main(args: Args) -> None:
    artifacts = args.execution.artifacts
    paths = args.votes or (artifacts / "data/arena55k.parquet", artifacts / "data/arena33k.parquet")
    votes = load_comparisons(paths, args.execution)
    train, held_out = (votes, None) if args.final else split_fold(votes, args.held_out_fold)
    name = f"{args.model}-final" if args.final else args.model
    task = Task(
        stage="stage3",
        model=args.model,
        checkpoint=args.checkpoint or str(artifacts / "stage2" / args.model),
        output=args.output or artifacts / "stage3" / name,
        recipe=args.recipe,
        table=RECIPES[args.model],
        train=train,
        held_out=held_out,
        instruction=read_instruction(args.instruction),
    )
    finetune(task, args.execution, args.training)


if __name__ == "__main__":
    cli(main, arguments=by_model(Args, RECIPES))
