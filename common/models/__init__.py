"""Preference models on packed sequences: `load_model(path_or_short_name)`, `save_checkpoint(folder, ...)`."""

from common.models.checkpoint import checkpoint_hash, load_model, read_preference, save_checkpoint
from common.models.preference import PreferenceModel
from common.models.threads import use_threads
from common.models.zoo import find_checkpoint

__all__ = [
    "PreferenceModel",
    "checkpoint_hash",
    "find_checkpoint",
    "load_model",
    "read_preference",
    "save_checkpoint",
    "use_threads",
]
