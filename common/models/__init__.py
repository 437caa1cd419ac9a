"""Preference models on packed sequences: `load_model(path_or_short_name)`, `save_checkpoint(folder, ...)`."""

from common.models import zoo
from common.models.checkpoint import Surgery, load_model, save_checkpoint
from common.models.preference import PreferenceModel
from common.models.zoo import find_checkpoint

__all__ = ["PreferenceModel", "Surgery", "find_checkpoint", "load_model", "save_checkpoint", "zoo"]
