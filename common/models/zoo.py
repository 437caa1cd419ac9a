"""The known checkpoints: short name -> where it lies; any other too, and which of its files are read."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from common.files import confined, read_json

ZOO = {
    "gemma9b": "google/gemma-2-9b-it",
    "gemma27b": "google/gemma-2-27b-it",
    "armorm8b": "RLHFlow/ArmoRM-Llama3-8B-v0.1",
    "tiny-gemma": "artifacts/demo/models/tiny-gemma",  # made by data_prep/demo_arena.py
    "tiny-llama": "artifacts/demo/models/tiny-llama",
}
"""Short name -> hub id (OWNER/NAME) or folder."""
SIZES = {
    "gemma9b": "9.2 billion parameters",
    "gemma27b": "27.2 billion parameters",
    "armorm8b": "a reward model of 7.5 billion parameters",
    **dict.fromkeys(("tiny-gemma", "tiny-llama"), "150,000 parameters, for a CPU"),
}
"""For people."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL_FILES = (
    *("config*.json", "preference.json", "trained_on.parquet", "adapter_config.json", INDEX),
    *("tokenizer*", "*.model", "tekken.json", "vocab*", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template*", "additional_chat_templates/*"),
)
"""What is read of a checkpoint besides its weights, by us or by transformers."""
_WEIGHTS = ["model*.safetensors"]
AGAIN = "fetch or copy its files again from where they came, or take another checkpoint"


def find_checkpoint(path_or_short_name: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a checkpoint, downloaded when it stands on the hub.

    Args:
        path_or_short_name: An existing folder (which wins), a short name of `ZOO`, or a hub id OWNER/NAME.
        weights: False downloads the config and the tokenizer alone.

    Raises:
        ValueError: Nothing of that name, the download failed, or a file is not one below the folder.
    """
    folder = _find(str(path_or_short_name), weights)
    checkpoint_files(folder)
    return folder


def checkpoint_files(folder: Path) -> list[str]:
    """Names of all files that are read of a checkpoint folder, sorted.

    Raises:
        ValueError: One of them is not a regular file below the folder.
    """
    found = {path for pattern in SMALL_FILES for path in folder.glob(pattern) if not path.is_dir()}
    names = {path.relative_to(folder).as_posix() for path in found}
    names |= {file for file in weight_files(folder) if (folder / file).exists()}
    for name in names:
        confined(folder, name)
    return sorted(names)


def weight_files(folder: Path) -> list[str]:
    """Names of the weight files that are read of a checkpoint folder, whether they are there or not."""
    return sorted(set(weight_map(folder).values())) or [SINGLE]


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file, empty when everything lies in the single file."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return {}
    found = read_json(confined(folder, INDEX)).get("weight_map")
    is_map = isinstance(found, dict) and all(isinstance(file, str) for file in found.values())
    if not is_map or not found:
        raise ValueError(
            f"{folder / INDEX} has no weight_map of tensor names to file names, but {found!r:.80}; {AGAIN}"
        )
    return found


def _find(name: str, weights: bool) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    source = ZOO.get(name, name)
    if Path(source).is_dir():
        return Path(source)
    if source.startswith("artifacts/"):
        raise ValueError(
            f"{name}: the folder {source} does not exist under {Path.cwd()}; "
            "the demo's checkpoints are made by data_prep/demo_arena.py, trained ones by the stages"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ValueError(
            f"no checkpoint {name!r}: not a folder, not a hub id OWNER/NAME and not a known short name "
            f"({', '.join(ZOO)}). If a stage should have made that folder, run that stage first"
        )
    try:
        return Path(snapshot_download(source, allow_patterns=[*SMALL_FILES, *(_WEIGHTS if weights else [])]))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ValueError(
            f"{name}: no such folder, and {source} could not be fetched from the Hugging Face hub: {error}\n"
            "If the model is gated, accept its licence on its page and run `hf auth login`; without network, "
            f"give the path of a local copy. Known short names: {', '.join(ZOO)}."
        ) from error
