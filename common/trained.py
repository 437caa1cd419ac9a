"""A trained checkpoint's model and its prompt, checked against each other."""

import torch

from common.models import PreferenceModel, find_checkpoint, load_model
from common.prompts import Prompter, load_tokenizer


def open_prompter(checkpoint: str, preference: dict | None) -> Prompter:
    """The prompt that a checkpoint was trained with, checked against the tokenizer that lies beside it.

    Args:
        checkpoint: Folder, hub id or short name.
        preference: Its preference.json.

    Raises:
        ValueError: The checkpoint has no preference head, or its template hash is not what this code and its
            tokenizer give.
    """
    if preference is None:
        raise ValueError(
            f"{checkpoint} has no preference.json: it is a backbone; train it with stages/stage1.py"
        )
    stored = preference["prompt"]
    prompter = Prompter(
        load_tokenizer(find_checkpoint(checkpoint)),
        conversation_tokens=stored["conversation_tokens"],
        instruction=stored["instruction"],
    )
    if prompter.prompt_hash != stored["prompt_hash"]:
        raise ValueError(
            f"{checkpoint} was trained with prompt {stored['prompt_hash'][:12]}, but this code and the "
            f"tokenizer in that folder give {prompter.prompt_hash[:12]}: its scores would be wrong. Use the "
            "code and the tokenizer that it was trained with."
        )
    return prompter


def open_model(
    checkpoint: str, *, dtype: torch.dtype | None, device: torch.device | str, ops: str
) -> PreferenceModel:
    """A trained checkpoint in evaluation mode; `dtype` None computes in fp32 on a CPU and bf16 elsewhere."""
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    return load_model(checkpoint, dtype=dtype, device=device, ops=ops)
