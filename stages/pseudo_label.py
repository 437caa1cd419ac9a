"""Pseudo labels: every teacher's probabilities for a pool of comparisons, then the ensemble's soft labels.

In    artifacts/stage1/<teacher>/ (all complete ones, or those named); the pool's comparison tables
Out   artifacts/pseudo/<teacher>/probabilities.parquet   by key, one column group an order
      artifacts/pseudo/ensemble/labels.parquet           every teacher's columns by key, then their mean
Run   just pseudo-label
      just pseudo-label --teachers artifacts/stage1/gemma9b --no-merge

Every process holds a full replica. A stopped run continues after the last whole shard, with the same result.
"""

from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
from accelerate import Accelerator

from common.console import cli, progress, say
from common.data.held_out import Seen, default_tables, load_comparisons, without_seen
from common.data.table import LABELS, ORDERS, Order, scan, table_hash, write_table
from common.files import file_hash
from common.models import checkpoint_hash
from common.runs import Run, find_complete
from common.score.ensemble import group_columns, read_group
from common.score.predict import MAX_TOKENS, average, predict_orders
from common.tokens import tokenise
from common.train.launch import leave, on_first, start
from common.train.memory import clear_prediction
from common.train.recipe import Execution, by_flags, check_least
from common.train.steps import open_trained
from common.trained import open_prompter


@dataclass(frozen=True, kw_only=True)
class Args:
    """Pseudo labels by any teachers over any comparisons."""

    execution: Execution = field(default_factory=Execution)
    teachers: tuple[Path, ...] = ()
    """Checkpoint folders; by default every complete one in <artifacts>/stage1."""
    comparisons: tuple[Path, ...] = ()
    """The pool; by default those of lmsys1m_pairs.parquet and preference_sets.parquet below <artifacts>/data
    that are there."""
    output: Path | None = None
    """Folder of the labels; by default <artifacts>/pseudo."""
    orders: tuple[Order, ...] = ORDERS
    """Orders in which the answers are shown; averaging both costs twice the time and is worth it."""
    seen: Seen = "refuse"
    """Comparisons that a teacher was trained on: refuse to go on, or leave them out, counted."""
    merge: bool = True
    """Write the ensemble's soft labels when all teachers are done."""
    comparisons_per_shard: int = 4096
    """Comparisons between two points from which a stopped run continues."""
    max_tokens_per_micro_batch: int = MAX_TOKENS
    """Tokens per rank per micro-batch."""

    def __post_init__(self) -> None:
        if not self.orders or len(set(self.orders)) < len(self.orders):
            raise ValueError(f"--orders is {self.orders}, expected one or both of {ORDERS}")
        check_least(self, comparisons_per_shard=1, max_tokens_per_micro_batch=1)


def main(args: Args) -> None:
    artifacts = args.execution.artifacts
    accelerator = start(replicas=True)
    teachers = args.teachers or on_first(accelerator, lambda: find_complete(artifacts / "stage1"))
    if len({teacher.name for teacher in teachers}) < len(teachers):
        raise ValueError(
            f"--teachers {' '.join(map(str, teachers))}: two have the same folder name, and their labels "
            "would lie in one folder; rename one"
        )
    paths = args.comparisons or default_tables(artifacts, "lmsys1m_pairs", "preference_sets")
    pool = load_comparisons(paths, artifacts=artifacts, skip_bad_rows=args.execution.skip_bad_rows)
    output = args.output or artifacts / "pseudo"
    for teacher in teachers:
        with clear_prediction(args.max_tokens_per_micro_batch, device=accelerator.device):
            label(teacher, pool, output / teacher.name, args, accelerator)
    if args.merge and accelerator.is_main_process:
        merge([output / teacher.name / "probabilities.parquet" for teacher in teachers], output / "ensemble")
    leave(accelerator)


def label(teacher: Path, pool: pl.DataFrame, output: Path, args: Args, accelerator: Accelerator) -> None:
    """One teacher's probabilities, shard by shard in the order of (source, id)."""
    pool = without_seen(pool, teacher, args.seen)
    run = on_first(
        accelerator,
        lambda: Run.open(
            output,
            recipe={"orders": list(args.orders), "comparisons_per_shard": args.comparisons_per_shard},
            inputs={"teacher": checkpoint_hash(teacher), "comparisons": table_hash(pool)},
        ),
    )
    if run.is_complete:
        say(f"{output} is up to date")
        return
    model = open_trained(teacher, args.execution, accelerator)
    prompter = open_prompter(str(teacher), model.preference)
    if accelerator.is_main_process:
        run.begin()
    accelerator.wait_for_everyone()
    sequences = tokenise(
        pool,
        prompter,
        formats=(model.preference["formats"][0],),
        orders=args.orders,
        cache=args.execution.artifacts / "tokens",
        accelerator=accelerator,
    )
    shards = range(0, len(sequences.frame), args.comparisons_per_shard)
    paths = [output / "shards" / f"{number:05d}.parquet" for number in range(len(shards))]
    done = sum(path.is_file() for path in paths)
    accelerator.wait_for_everyone()  # nobody writes a shard before everybody has counted
    with progress(f"labelling with {teacher.name}", len(shards), "shards", start=done) as advance:
        for start_row, path in zip(shards[done:], paths[done:], strict=True):
            part = sequences.rows(start_row, start_row + args.comparisons_per_shard)
            orders = predict_orders(
                model,
                part,
                max_tokens=args.max_tokens_per_micro_batch,
                device=accelerator.device,
                description=None,
            )
            if accelerator.is_main_process:
                groups = {f"{teacher.name}/{order}": values for order, values in orders.items()}
                write_table(part.frame.select("source", "id").with_columns(group_columns(groups)), path)
            advance(1)
    if accelerator.is_main_process:
        write_table(scan(paths).collect(), output / "probabilities.parquet")
        run.finish({"num_comparisons": len(sequences.frame)})
    accelerator.wait_for_everyone()


def merge(paths: list[Path], output: Path) -> None:
    """Joins the teachers by key; the soft label is the mean over teachers of the mean over orders."""
    recipe = {"teachers": [path.parent.name for path in paths]}
    run = Run.open(output, recipe=recipe, inputs={path.parent.name: file_hash(path) for path in paths})
    if run.is_complete:
        say(f"{output} is up to date")
        return
    run.begin()
    frames = [scan(path).collect() for path in paths]
    joined = frames[0]
    for frame in frames[1:]:
        joined = joined.join(frame, on=["source", "id"], how="inner", validate="1:1", maintain_order="left")
    if len(joined) < max(len(frame) for frame in frames):
        say(
            f"{max(map(len, frames)) - len(joined):,} comparisons are not labelled by every teacher: left out"
        )
    means = [average([read_group(joined, group) for group in _groups(frame)]) for frame in frames]
    soft = average(means)
    columns = [pl.Series(name, soft[:, i]) for i, name in enumerate(LABELS)]
    write_table(joined.with_columns(columns), output / "labels.parquet")
    run.finish({"num_comparisons": len(joined)})
    say(f"{output / 'labels.parquet'}: soft labels of {len(paths)} teachers for {len(joined):,} comparisons")


def _groups(frame: pl.DataFrame) -> list[str]:
    """Names of the column groups (model and order) of a frame."""
    return sorted({name.rpartition("/")[0] for name in frame.columns if "/" in name})


if __name__ == "__main__":
    cli(main, arguments=by_flags(Args))
