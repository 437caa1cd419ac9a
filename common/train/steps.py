"""What stages 1, 2 and 3 have in common: tokenise, describe, load, fit, score the held-out fold, save."""

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import polars as pl
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from common.console import say, show_table
from common.data.table import LABELS, content_hashes, is_labelled, labels_array, table_hash, write_table
from common.files import read_json, write_json
from common.inputs import checkpoint_hash, read_trained_on
from common.models import load_model, save_checkpoint
from common.models.checkpoint import find_checkpoint
from common.prompts import INSTRUCTION, Prompter, load_tokenizer
from common.runs import Run
from common.score.metrics import SUM_TOLERANCE, prior_log_loss, score
from common.score.predict import predict_orders
from common.tokens import Sequences, orders_of, tokenise
from common.train.fit import fit, plan_steps
from common.train.launch import is_fsdp, place, start
from common.train.recipe import Execution, Recipe, Training

NUM_LENGTH_BINS = 60
"""Of the histogram of sequence lengths in sequences.json."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One fine-tuning run, decided by a stage."""

    stage: str
    model: str
    """Short name."""
    checkpoint: str
    """Where the weights come from: folder, hub id or short name."""
    output: Path
    recipe: Recipe
    table: Recipe
    """The recipe table's entry, for showing what differs."""
    train: pl.DataFrame
    """Labelled comparisons."""
    held_out: pl.DataFrame | None = None
    """Labelled comparisons to score on; None where all were trained on."""
    instruction: str = INSTRUCTION


def finetune(task: Task, execution: Execution, training: Training) -> dict[str, object]:
    """Trains, scores and saves one model; continues a started run, or says that it is up to date.

    Returns:
        Metrics on the held-out comparisons (empty without them, or after a dry run).

    Raises:
        ValueError: A mistake in recipe, data, checkpoint or launch.
    """
    recipe = task.recipe
    accelerator = start(
        tracker="none" if training.dry_run else training.tracker, tracker_folder=task.output / "logs"
    )
    if accelerator.device.type == "cpu" and not (
        training.dry_run or training.allow_cpu or task.model.startswith("tiny-")
    ):
        raise ValueError(
            f"{task.model} would train on a CPU; launch it on GPUs (just {task.stage} {task.model}), take a "
            "tiny-* model, or say --allow-cpu"
        )
    for frame in (task.train, task.held_out):
        _check_labelled(frame, task)
    parent = find_checkpoint(task.checkpoint, weights=not training.dry_run)
    prompter = Prompter(
        load_tokenizer(parent),
        conversation_tokens=recipe.conversation_tokens,
        instruction=task.instruction,
    )
    parent_preference = _parent_preference(parent, prompter)
    if training.dry_run:
        _describe(task, _tokenise(task.train, prompter, task, execution, accelerator), accelerator)
        return {}
    run, lineage = _open_run(task, parent, prompter, accelerator)
    if run.is_complete:
        say(f"{task.output} is up to date")
        return run.metrics

    sequences = _tokenise(task.train, prompter, task, execution, accelerator)
    _describe(task, sequences, accelerator)
    trained_on = _trained_on(task.train, parent)
    # Before anything is written: a bad checkpoint leaves no folder behind.
    model = _load(task, execution, accelerator)
    if accelerator.is_main_process:
        run.begin()
        write_json(task.output / "sequences.json", _sequence_summary(sequences, recipe))
    accelerator.wait_for_everyone()
    accelerator.init_trackers("tracker")
    fit(model, sequences, recipe=recipe, training=training, run=run, accelerator=accelerator)
    metrics = {}
    if task.held_out is not None:
        held_out = _unseen(task.held_out, trained_on)
        metrics = _score(model, held_out, prompter, task, execution, accelerator)
    weights = full_state_dict(model)
    if accelerator.is_main_process:
        write_table(trained_on.to_frame(), task.output / "trained_on.parquet")
        save_checkpoint(
            task.output,
            model=model,
            state_dict=weights,
            tokenizer=prompter.tokenizer,
            preference={
                "stage": task.stage,
                "model": task.model,
                "classes": list(LABELS),
                "formats": list(recipe.formats),
                "prompt": prompter.describe(),
                "recipe": asdict(recipe),
                "metrics": metrics,
                "label_prior": labels_array(task.train).mean(axis=0, dtype=np.float64).tolist(),
                "lineage": {
                    **lineage,
                    "parent_stage": (parent_preference or {}).get("stage"),
                    "train_sources": dict(sorted(task.train["source"].value_counts().iter_rows())),
                },
                "versions": {name: version(name) for name in ("torch", "transformers", "torch-optimi")},
            },
        )
        run.finish(metrics)
        say(f"{task.output} is complete")
    accelerator.end_training()
    return metrics


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU of the first process; the others get an empty dict under FSDP."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _check_labelled(frame: pl.DataFrame | None, task: Task) -> None:
    """What teaches and what scores must carry labels, votes or soft ones; a ValueError before any work."""
    if frame is None:
        return
    if len(unlabelled := frame.filter(~is_labelled())):
        raise ValueError(
            f"{task.stage} needs labels, but {len(unlabelled):,} of {len(frame):,} comparisons have none, "
            f"first {'/'.join(unlabelled.select('source', 'id').row(0))}; is this an unlabelled pool? Label "
            "it with stages/pseudo_label.py and train stage 2 on it"
        )
    labels = labels_array(frame)
    bad = ~(np.abs(labels.sum(1) - 1) <= SUM_TOLERANCE) | (labels < 0).any(1)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"{task.stage}: the labels of {int(bad.sum()):,} comparisons are no probabilities, first "
            f"{'/'.join(frame.select('source', 'id').row(row))} with {labels[row].tolist()}; expected "
            "numbers from 0 on that sum to 1"
        )


def _parent_preference(parent: Path, prompter: Prompter) -> dict | None:
    """preference.json of a checkpoint that a stage continues; its template and tokenizer must be ours."""
    path = parent / "preference.json"
    if not path.is_file():
        return None
    preference = read_json(path)
    theirs = preference["prompt"]["template_hash"]
    if theirs != prompter.template_hash:
        raise ValueError(
            f"{parent} was trained with template and tokenizer {theirs[:12]}, here they are "
            f"{prompter.template_hash[:12]}: continue with the code and tokenizer that it was trained with"
        )
    return preference


def _open_run(
    task: Task, parent: Path, prompter: Prompter, accelerator: Accelerator
) -> tuple[Run, dict[str, object]]:
    """The run folder and its lineage: hashes of everything that goes in."""
    inputs: list[dict[str, object]] = [{}]
    if accelerator.is_main_process:
        inputs[0] = {
            "checkpoint": checkpoint_hash(parent),
            "train": table_hash(task.train),
            "held_out": None if task.held_out is None else table_hash(task.held_out),
            "prompt": prompter.prompt_hash,
        }
    broadcast_object_list(inputs)
    recipe = {"stage": task.stage, "model": task.model, **asdict(task.recipe)}
    return Run.open(task.output, recipe=recipe, inputs=inputs[0]), {**inputs[0], "parent": task.checkpoint}


def _tokenise(
    frame: pl.DataFrame,
    prompter: Prompter,
    task: Task,
    execution: Execution,
    accelerator: Accelerator,
    **variants: object,
) -> Sequences:
    recipe = task.recipe
    settings = {"formats": recipe.formats, "orders": orders_of(recipe.swap), "seed": recipe.seed, **variants}
    return tokenise(
        frame,
        prompter,
        cache=execution.artifacts / "tokens",
        is_writer=accelerator.is_main_process,
        wait=accelerator.wait_for_everyone,
        **settings,
    )


def _describe(task: Task, sequences: Sequences, accelerator: Accelerator) -> None:
    """Prints the resolved recipe, what differs from the table, and what it amounts to."""
    changed = task.recipe.changed_from(task.table)
    show_table(
        f"{task.stage} {task.model} <- {task.checkpoint}",
        ("recipe", "value", "table"),
        [
            (name, value, changed[name][0] if name in changed else "")
            for name, value in asdict(task.recipe).items()
        ],
    )
    num_steps = len(plan_steps(len(sequences.frame), task.recipe))
    lengths = sequences.lengths
    rows = [
        ("comparisons", f"{len(sequences.frame):,}"),
        ("sequences (formats x orders)", f"{len(sequences):,}"),
        ("optimiser steps", f"{num_steps:,}"),
        ("processes", accelerator.num_processes),
        ("tokens an epoch", f"{int(lengths.sum()):,}"),
        ("tokens a sequence: mean, longest", f"{lengths.mean():,.0f}, {lengths.max():,}"),
        ("truncated sequences", f"{int(sequences.truncated.sum()):,}"),
        ("pairs that became identical", f"{int(sequences.became_identical.sum()):,}"),
    ]
    show_table("what this amounts to", ("", "number"), rows)


def _sequence_summary(sequences: Sequences, recipe: Recipe) -> dict[str, object]:
    """What was trained on, for the report: how long the sequences are, and how many the budget cut."""
    counts, edges = np.histogram(sequences.lengths, bins=NUM_LENGTH_BINS)
    return {
        "num_sequences": len(sequences),
        "num_truncated": int(sequences.truncated.sum()),
        "num_became_identical": int(sequences.became_identical.sum()),
        "conversation_tokens": recipe.conversation_tokens,
        "length_edges": edges.tolist(),
        "length_counts": counts.tolist(),
    }


def _trained_on(train: pl.DataFrame, parent: Path) -> pl.Series:
    """Content hashes of everything that this model or an ancestor was trained on."""
    hashes = content_hashes(train)
    if (parent / "trained_on.parquet").is_file():
        hashes = pl.concat([hashes, read_trained_on(parent)], rechunk=True)
    return hashes.unique().sort().alias("content_hash")


def _unseen(held_out: pl.DataFrame, trained_on: pl.Series) -> pl.DataFrame:
    """Held-out rows that no ancestor was trained on; the others are counted."""
    seen = content_hashes(held_out).is_in(trained_on.implode())
    if seen.all():
        raise ValueError(
            "every held-out comparison was trained on by this model or an ancestor, so there is nothing to "
            "score. Take another --held-out-fold, or --final in stage 3"
        )
    if seen.any():
        say(f"{seen.sum():,} held-out rows were trained on by an ancestor and are not scored")
    return held_out.filter(~seen)


def _load(task: Task, execution: Execution, accelerator: Accelerator) -> nn.Module:
    """Weights on the first process (everywhere without FSDP), then placed; prints the surgery."""
    recipe = task.recipe
    sharded = is_fsdp(accelerator)
    model = load_model(
        task.checkpoint,
        dtype=recipe.torch_dtype,
        device="cpu" if sharded else accelerator.device,
        ops=execution.ops,
        sliding_window=None if recipe.sliding_window == "off" else "checkpoint",
        head_seed=recipe.seed,
        head_dropout=recipe.head_dropout,
        activation_checkpointing=recipe.activation_checkpointing,
        materialise=accelerator.is_main_process or not sharded,
    )
    if accelerator.is_main_process:
        say(str(model.surgery))
    return place(model, accelerator, reduce_dtype=torch.float32 if recipe.reduce_dtype == "fp32" else None)


def _score(
    model: nn.Module,
    held_out: pl.DataFrame,
    prompter: Prompter,
    task: Task,
    execution: Execution,
    accelerator: Accelerator,
) -> dict[str, object]:
    """Scores the held-out comparisons in the given order and saves the probabilities."""
    sequences = _tokenise(
        held_out, prompter, task, execution, accelerator, formats=(task.recipe.formats[0],), orders=("given",)
    )
    given = predict_orders(
        model,
        sequences,
        max_tokens=task.recipe.max_tokens_per_micro_batch,
        device=accelerator.device,
        description="scoring the held-out fold",
    )["given"]
    labels = labels_array(sequences.frame)
    metrics = {
        **score(given, labels),
        "prior_log_loss": prior_log_loss(labels_array(task.train), labels),
    }
    if accelerator.is_main_process:
        columns = [pl.Series(name, given[:, i]) for i, name in enumerate(LABELS)]
        keys = sequences.frame.select("source", "id")
        write_table(keys.with_columns(columns), task.output / "held_out.parquet")
        low, high = metrics["log_loss_interval"]
        say(
            f"{task.stage} {task.model}: log loss {metrics['log_loss']:.4f} ({low:.4f} to {high:.4f}) on "
            f"{metrics['num_comparisons']:,} held-out comparisons, accuracy {metrics['accuracy']:.3f}, "
            f"prior {metrics['prior_log_loss']:.4f}"
        )
    return metrics
