"""What the stages share, one small function an event, in the order in which training calls them."""

from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import polars as pl
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from common import models
from common.console import say, show_table
from common.data.held_out import unseen
from common.data.table import LABELS, labels_array, table_hash, write_table
from common.prompts import Prompter, read_instruction
from common.runs import Run, check_whole, read_run
from common.score.metrics import prior_log_loss, score
from common.score.predict import MAX_TOKENS, predict_orders
from common.tokens import Sequences, orders_of, rendering_hash, tokenise
from common.train.fit import num_never_taken, plan_steps
from common.train.launch import is_fsdp, leave, on_first, place, start
from common.train.memory import clear_out_of_memory, ways_out
from common.train.recipe import Execution, Recipe, Training
from common.trained import make_prompter, open_model

NUM_LENGTH_BINS = 60
"""Of the histogram of sequence lengths in sequences.json."""


def start_training(stage: str, model: str, output: Path, training: Training) -> Accelerator:
    """Starts the processes of a training stage; a real recipe does not begin on a CPU unless told to.

    Args:
        stage: Such as "stage1".
        model: Short name.
        output: The run's folder, where the tracker writes.

    Raises:
        ValueError: A mistake in the launch, or no GPU.
    """
    tracker = "none" if training.dry_run else training.tracker
    accelerator = start(tracker=tracker, tracker_folder=output / "logs")
    may_use_cpu = training.dry_run or training.allow_cpu or model.startswith("tiny-")
    if accelerator.device.type == "cpu" and not may_use_cpu:
        raise ValueError(
            f"{model} would train on a CPU; launch it on GPUs (just {stage} {model}), take a tiny-* model, "
            "or say --allow-cpu"
        )
    return accelerator


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The checkpoint that a stage starts from, and the prompt that its tokenizer gives."""

    name: str
    """As given: folder, hub id or short name."""
    folder: Path
    prompter: Prompter
    preference: dict | None
    """Its preference.json; None for a published backbone."""


def open_parent(checkpoint: str, recipe: Recipe, *, instruction: Path | None, training: Training) -> Parent:
    """Finds (a dry run: without the weights) the checkpoint to start from, and opens its prompt.

    Args:
        checkpoint: Folder, hub id or short name.
        instruction: Text file with another instruction.

    Raises:
        ValueError: There is none, its tokenizer cannot be used or has tokens without an embedding, or it was
            trained with another template or tokenizer.
    """
    folder = models.find_checkpoint(checkpoint, weights=not training.dry_run)
    preference = models.read_preference(folder)
    prompter = make_prompter(
        folder,
        conversation_tokens=recipe.conversation_tokens,
        instruction=read_instruction(instruction),
        preference=preference,
    )
    theirs = prompter.template_hash if preference is None else preference["prompt"]["template_hash"]
    if theirs != prompter.template_hash:
        raise ValueError(
            f"{folder} was trained with template and tokenizer {theirs[:12]}, here they are "
            f"{prompter.template_hash[:12]}: continue with the code and tokenizer that it was trained with"
        )
    return Parent(name=checkpoint, folder=folder, prompter=prompter, preference=preference)


def open_run(
    stage: str,
    model: str,
    output: Path,
    recipe: Recipe,
    parent: Parent,
    *,
    train: pl.DataFrame,
    held_out: pl.DataFrame | None,
    accelerator: Accelerator,
) -> Run:
    """The run folder, described by the recipe and the hashes of everything that goes in.

    Raises:
        ValueError: The folder holds another run, another process has it open, or the parent is not what its
            own run has left.
    """

    def open_first() -> Run:
        if (parent.folder / "run.json").is_file():
            check_whole(parent.folder, read_run(parent.folder))
        inputs = {
            "checkpoint": models.checkpoint_hash(parent.folder),
            "train": table_hash(train),
            "held_out": None if held_out is None else table_hash(held_out),
            "prompt": rendering_hash(parent.prompter),
        }
        return Run.open(output, recipe={"stage": stage, "model": model, **asdict(recipe)}, inputs=inputs)

    return on_first(accelerator, open_first)


def tokenise_for(
    recipe: Recipe, frame: pl.DataFrame, parent: Parent, execution: Execution, accelerator: Accelerator
) -> Sequences:
    """Every comparison in the recipe's formats and orders."""
    return tokenise(
        frame,
        parent.prompter,
        formats=recipe.formats,
        orders=orders_of(recipe.swap),
        seed=recipe.seed,
        cache=execution.artifacts / "tokens",
        accelerator=accelerator,
    )


def describe(
    title: str,
    recipe: Recipe,
    table: Recipe,
    sequences: Sequences,
    num_processes: int,
    *,
    whole: bool = False,
) -> None:
    """Prints what differs from the stage's table (`whole`: the whole recipe), and what it amounts to."""
    changed = recipe.changed_from(table)
    lengths = sequences.lengths
    rows = [
        ("comparisons", f"{len(sequences.frame):,}"),
        ("sequences (formats x orders)", f"{len(sequences):,}"),
        ("optimiser steps", f"{len(plan_steps(len(sequences.frame), recipe)):,}"),
        ("comparisons that no step takes", _lost(len(sequences.frame), recipe)),
        ("processes", num_processes),
        ("tokens an epoch", f"{int(lengths.sum()):,}"),
        ("tokens a sequence: mean, longest", f"{lengths.mean():,.0f}, {lengths.max():,}"),
        ("truncated sequences", f"{int(sequences.truncated.sum()):,}"),
        ("pairs that became identical", f"{int(sequences.became_identical.sum()):,}"),
    ]
    if not whole:
        differs = ", ".join(f"{name} {ours} for {theirs}" for name, (theirs, ours) in changed.items())
        say(f"{title}; recipe: {differs or 'as in the table'}")
        return say("; ".join(f"{name} {value}" for name, value in rows))
    values = [(name, value, changed.get(name, ("",))[0]) for name, value in asdict(recipe).items()]
    show_table(title, ("recipe", "value", "table"), values)
    show_table("what this amounts to", ("", "number"), rows)


def _lost(num_rows: int, recipe: Recipe) -> str:
    """How many comparisons an incomplete last step loses, and the flag near the recipe's that loses least."""
    lost, per_step = num_never_taken(num_rows, recipe), recipe.comparisons_per_step
    reach = max(1, per_step // 10)
    near = range(max(1, per_step - reach), min(num_rows, per_step + reach) + 1)
    best = min(near, key=lambda size: (num_rows % size, abs(size - per_step)))
    least = num_never_taken(num_rows, replace(recipe, comparisons_per_step=best))
    return f"{lost:,}" + f"; with --comparisons-per-step {best}: {least:,}" * (least < lost)


def load_and_place(
    parent: Parent, recipe: Recipe, execution: Execution, accelerator: Accelerator
) -> nn.Module:
    """Weights on the first process (everywhere without FSDP), then placed; prints the surgery and the ops."""
    sharded = is_fsdp(accelerator)
    with clear_out_of_memory(f"for the weights. {ways_out()}", device=accelerator.device):
        model = models.load_model(
            parent.name,
            dtype=recipe.torch_dtype,
            device="cpu" if sharded else accelerator.device,
            ops=execution.ops,
            compile=execution.compile,
            sliding_window=None if recipe.sliding_window == "off" else "checkpoint",
            head_seed=recipe.seed,
            head_dropout=recipe.head_dropout,
            materialise=accelerator.is_main_process or not sharded,
        )
        if accelerator.is_main_process:
            say(f"{model.surgery}; ops: {model.ops}")
        reduce_dtype = torch.float32 if recipe.reduce_dtype == "fp32" else None
        return place(model, accelerator, reduce_dtype=reduce_dtype)


def open_trained(checkpoint: Path, execution: Execution, accelerator: Accelerator) -> models.PreferenceModel:
    """A trained checkpoint, whole on every process, to predict with; prints the ops."""
    how = {"ops": execution.ops, "compile": execution.compile}
    model = open_model(str(checkpoint), dtype=None, device=accelerator.device, **how)
    say(f"{checkpoint}; ops: {model.ops}")
    return model


def begin(run: Run, sequences: Sequences, recipe: Recipe, accelerator: Accelerator) -> None:
    """Writes the run's first files; only now, so that a bad checkpoint leaves no folder behind."""
    if accelerator.is_main_process:
        run.begin()
        counts, edges = np.histogram(sequences.lengths, bins=NUM_LENGTH_BINS)
        summary = {
            "num_sequences": len(sequences),
            "num_truncated": int(sequences.truncated.sum()),
            "num_became_identical": int(sequences.became_identical.sum()),
            "conversation_tokens": recipe.conversation_tokens,
            "length_edges": edges.tolist(),
            "length_counts": counts.tolist(),
        }
        run.write("sequences.json", summary)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("tracker")


def score_held_out(
    model: nn.Module,
    held_out: pl.DataFrame | None,
    run: Run,
    recipe: Recipe,
    parent: Parent,
    execution: Execution,
    accelerator: Accelerator,
    *,
    train: pl.DataFrame,
    trained_on: pl.Series,
) -> dict[str, object]:
    """Scores the held-out comparisons that are unseen, in the given order, and saves the probabilities.

    Args:
        trained_on: As of `common.data.held_out.all_trained_on`.

    Returns:
        As of `common.score.metrics.score`, and `prior_log_loss`; nothing where nothing is held out.

    Raises:
        ValueError: The model or an ancestor was trained on all of them.
    """
    if held_out is None:
        return {}
    held_out = unseen(held_out, trained_on)
    one_way = replace(recipe, formats=recipe.formats[:1], swap="none")
    sequences = tokenise_for(one_way, held_out, parent, execution, accelerator)
    tell = f"scoring what is held out; the last training state is kept. {ways_out()}"
    with clear_out_of_memory(tell, device=accelerator.device):
        given = predict_orders(
            model,
            sequences,
            max_tokens=MAX_TOKENS,
            device=accelerator.device,
            description="scoring the held-out fold",
        )["given"]
    labels = labels_array(sequences.frame)
    metrics = {**score(given, labels), "prior_log_loss": prior_log_loss(labels_array(train), labels)}
    if accelerator.is_main_process:
        columns = [pl.Series(name, given[:, i]) for i, name in enumerate(LABELS)]
        keys = sequences.frame.select("source", "id")
        write_table(keys.with_columns(columns), run.folder / "held_out.parquet")
        described, (low, high) = run.description["recipe"], metrics["log_loss_interval"]
        say(
            f"{described['stage']} {described['model']}: log loss {metrics['log_loss']:.4f} "
            f"({low:.4f} to {high:.4f}) on "
            f"{metrics['num_comparisons']:,} held-out comparisons, accuracy {metrics['accuracy']:.3f}, "
            f"prior {metrics['prior_log_loss']:.4f}"
        )
    return metrics


def save(
    model: nn.Module,
    run: Run,
    recipe: Recipe,
    parent: Parent,
    accelerator: Accelerator,
    *,
    metrics: dict[str, object],
    train: pl.DataFrame,
    trained_on: pl.Series,
) -> None:
    """Writes the checkpoint, what it was trained on and where it comes from, and ends the run."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)  # empty but on the first process, under FSDP
    if accelerator.is_main_process:
        write_table(trained_on.to_frame(), run.folder / "trained_on.parquet")
        described = run.description
        models.save_checkpoint(
            run.folder,
            model=model,
            state_dict=weights,
            tokenizer=parent.prompter.tokenizer,
            preference={
                "stage": described["recipe"]["stage"],
                "model": described["recipe"]["model"],
                "classes": list(LABELS),
                "formats": list(recipe.formats),
                "prompt": parent.prompter.describe(),
                "recipe": asdict(recipe),
                "metrics": metrics,
                "label_prior": labels_array(train).mean(axis=0, dtype=np.float64).tolist(),
                "lineage": {
                    **described["inputs"],
                    "parent": parent.name,
                    "parent_stage": (parent.preference or {}).get("stage"),
                    "train_sources": dict(sorted(train["source"].value_counts().iter_rows())),
                },
                "versions": {name: version(name) for name in ("torch", "transformers", "torch-optimi")},
            },
        )
        run.finish(metrics)
        say(f"{run.folder} is complete")
    leave(accelerator)
