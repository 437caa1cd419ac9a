"""The recipe of a training stage (what is computed), and where and how stages run."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from common.models.zoo import SIZES, ZOO
from common.ops import Compile, named_backends
from common.prompts import Format
from common.tokens import Swap
from common.train.optim import Accumulation, OptimizerName


def check_least(args: object, **least: int) -> None:
    """ValueError where a number on the command line is below its least value; a word, as "auto", passes."""
    for name, number in least.items():
        if isinstance(value := getattr(args, name), int) and value < number:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected at least {number}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The numbers of one training stage; docs/recipes.md gives the reason for each."""

    formats: tuple[Format, ...] = ("PAB",)
    """Prompt formats; a comparison is trained on in all of them, in the same optimiser step."""
    swap: Swap = "full"
    """"full": both orders in the same step; "random": one of them by a stable hash; "none": as given."""
    conversation_tokens: int = 4096
    """Budget of the conversation, in tokens (PAPB: half of it a side)."""
    comparisons_per_step: int = 80
    """Comparisons per optimiser step, over all ranks."""
    epochs: int = 1
    """Passes over the comparisons."""
    optimizer: OptimizerName = "adamw"
    """optimi's AdamW or StableAdamW."""
    lr: float = 2.5e-6
    """Peak learning rate, reached after a tenth of the steps."""
    beta1: float = 0.9
    """Decay of the first moment, per step."""
    beta2: float = 0.99
    """Decay of the second moment, per step; at most 0.995 with bf16 states."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled, multiplied by the learning rate."""
    kahan_sum: bool = True
    """Compensate the rounding of bf16 weights."""
    accumulation: Accumulation = "fp32"
    """Gradient sums over micro-batches: fp32 (4 B a parameter) or stochastically rounded (2 B in bf16)."""
    reduce_dtype: Literal["parameter", "fp32"] = "parameter"
    """Dtype in which FSDP reduces gradients over ranks."""
    max_grad_norm: float | None = None
    """Clip gradients to this global norm; off by default (27B failed with it)."""
    sliding_window: Literal["checkpoint", "off"] = "checkpoint"
    """Gemma's window on every other layer: as in the checkpoint, or off."""
    head_dropout: float = 0.1
    """Dropout probability in the classification head."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of parameters and optimiser states."""
    seed: int = 3
    """Seed of the head's initialisation, the shuffle and the dropout."""

    def __post_init__(self) -> None:
        check_least(self, conversation_tokens=1, comparisons_per_step=1, epochs=1)
        for name in ("beta1", "beta2", "head_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected 0 <= x < 1")
        if not self.lr > 0:
            raise ValueError(f"--lr is {self.lr}, expected above 0")
        if not self.formats or len(set(self.formats)) != len(self.formats):
            raise ValueError(f"--formats is {self.formats}, expected PAB, PAPB or both, each once")
        if self.accumulation == "stochastic" and self.dtype == "fp32":
            raise ValueError(
                "--accumulation stochastic is for --dtype bf16; with fp32 say --accumulation fp32"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch knows it."""
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.dtype]

    def changed_from(self, table: "Recipe") -> dict[str, tuple[object, object]]:
        """Fields that differ from the table: name -> (table's value, ours)."""
        ours, theirs = asdict(self), asdict(table)
        return {name: (theirs[name], ours[name]) for name in ours if ours[name] != theirs[name]}


TINY = Recipe(conversation_tokens=256, comparisons_per_step=8, lr=2e-3, dtype="fp32")
"""Of the tiny models, in stages 1 and 2."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Where and how any stage runs; nothing here changes what is computed."""

    artifacts: Path = Path("artifacts")
    """Tree of everything made; inputs and outputs are found below it unless named."""
    ops: str = "auto"
    """Backend by name, or op=backend,...; "auto" takes for each op the fastest that is installed and fits."""
    compile: Compile = "auto"
    """torch.compile of what stands between the attentions; "auto": on GPUs that can."""
    skip_bad_rows: bool = False
    """Leave bad comparisons out, counted and written to a side file, instead of stopping."""

    def __post_init__(self) -> None:
        named_backends(self.ops)  # now, not when all is tokenised


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a training stage runs; nothing here changes what is computed: a run may go on with other values."""

    recompute: Literal["auto", "all", "none"] | int = "auto"
    """Decoder layers, from the first on, that compute their activations again in the backward pass, which
    saves memory and costs time; "auto": in each micro-batch as few as it needs."""
    max_tokens_per_micro_batch: Literal["auto"] | int = "auto"
    """Tokens per rank per micro-batch; a longer single sequence gets one of its own. "auto": what fits, as
    measured before the first step (8,192 on a CPU)."""
    dry_run: bool = False
    """Print the resolved recipe, steps, sequences, tokens and truncation, and stop."""
    allow_cpu: bool = False
    """Let a real recipe train without a GPU."""
    state_interval_steps: int = 100
    """Optimiser steps between saved training states."""
    keep_states: int = 1
    """Training states that stay on disk; 9B takes 74 GB each, 27B 218 GB."""
    tracker: str = "tensorboard"
    """An Accelerate tracker by name, or "none"."""

    def __post_init__(self) -> None:
        check_least(self, recompute=0, max_tokens_per_micro_batch=1, state_interval_steps=1, keep_states=1)


def by_model(args_type: type, table: dict[str, Recipe]) -> object:
    """A command line with one subcommand a model, whose flags default to the model's recipe."""
    kind = tyro.extras.subcommand_type_from_defaults(
        {name: args_type(model=name, recipe=recipe) for name, recipe in table.items()},
        {name: f"{ZOO[name]}: {SIZES[name]}." for name in table},
        prefix_names=False,
        sort_subcommands=False,
    )
    return tyro.conf.OmitArgPrefixes[kind]


def by_flags(args_type: type) -> object:
    """A command line whose flags carry no prefix of the dataclass that they stand in."""
    return tyro.conf.OmitArgPrefixes[args_type]
