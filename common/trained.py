"""A checkpoint's model, prompt and vocabulary, checked against each other."""

from pathlib import Path

import torch

from common.models import PreferenceModel, find_checkpoint, load_model
from common.models.families import read_config
from common.prompts import Prompter
from common.tokenizer import DATE, load_tokenizer


def make_prompter(
    folder: Path, *, conversation_tokens: int, instruction: str, preference: dict | None
) -> Prompter:
    """The prompt of a checkpoint's tokenizer, for a model of its config.json.

    Args:
        folder: Of the checkpoint, the weights not needed.
        conversation_tokens: As of `Prompter`, like `instruction`.
        preference: Its preference.json, which holds the date that its template is told; None: a backbone.

    Raises:
        ValueError: Tokenizer or chat template cannot be used, or a text can give an id that has no embedding.
    """
    prompter = Prompter(
        load_tokenizer(folder),
        conversation_tokens=conversation_tokens,
        instruction=instruction,
        date=DATE if preference is None else preference["prompt"].get("date", DATE),
    )
    if prompter.highest_id >= (rows := read_config(folder).vocab_size):
        raise ValueError(
            f"the tokenizer in {folder} gives token ids up to {prompter.highest_id}, but config.json says "
            f"vocab_size {rows}: those have no embedding. Take the tokenizer that belongs to the weights"
        )
    return prompter


def open_prompter(checkpoint: str, preference: dict | None) -> Prompter:
    """The prompt that a checkpoint was trained with, checked against the tokenizer that lies beside it.

    Args:
        checkpoint: Folder, hub id or short name.
        preference: Its preference.json.

    Raises:
        ValueError: The checkpoint has no preference head, its tokenizer cannot be used, or its template hash
            is not what this code and its tokenizer give.
    """
    if preference is None:
        raise ValueError(
            f"{checkpoint} has no preference.json: it is a backbone; train it with stages/stage1.py"
        )
    stored = preference["prompt"]
    prompter = make_prompter(
        find_checkpoint(checkpoint),
        conversation_tokens=stored["conversation_tokens"],
        instruction=stored["instruction"],
        preference=preference,
    )
    if prompter.prompt_hash != stored["prompt_hash"]:
        raise ValueError(
            f"{checkpoint} was trained with prompt {stored['prompt_hash'][:12]}, but this code and the "
            f"tokenizer in that folder give {prompter.prompt_hash[:12]}: its scores would be wrong. Use the "
            "code and the tokenizer that it was trained with."
        )
    return prompter


def open_model(
    checkpoint: str,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    ops: str,
    compile: str = "off",
) -> PreferenceModel:
    """A trained checkpoint in evaluation mode; `dtype` None computes in fp32 on a CPU and bf16 elsewhere."""
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    return load_model(checkpoint, dtype=dtype, device=device, ops=ops, compile=compile)
