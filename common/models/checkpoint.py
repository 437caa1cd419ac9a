"""A checkpoint folder becomes a model, and a model a checkpoint folder.

config.json (of the published backbone), model*.safetensors, the tokenizer's files and, in folders of our own,
preference.json: what the head means and how the backbone runs. It is written last: it makes the folder whole.
"""

import copy
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from common.files import (
    SHA256,
    TEXT,
    check_fields,
    known_hash,
    list_of,
    number,
    or_null,
    read_json,
    replacing,
    text_hash,
    write_json,
)
from common.models.families import COUNT, FAMILIES, POSITIVE, SIZE, Decoder, read_config
from common.models.head import head_hash, initial_head
from common.models.preference import PreferenceModel, Surgery
from common.models.weights import read_weights, write_weights
from common.models.zoo import checkpoint_files, find_checkpoint
from common.ops import Compile, choose

POLICY = ("sliding_window", "softcap", "embedding_scale")
"""Fields of `Decoder` that preference.json keeps: how the backbone was run when the head was trained."""


def load_model(
    path_or_short_name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    ops: str = "auto",
    compile: Compile = "off",
    sliding_window: int | Literal["checkpoint"] | None = "checkpoint",
    softcap: float | Literal["checkpoint"] | None = "checkpoint",
    num_classes: int = 3,
    head_seed: int = 3,
    head_dropout: float = 0.1,
    materialise: bool = True,
) -> PreferenceModel:
    """Loads a published backbone (with a newly drawn head) or one of our own checkpoints, in evaluation mode.

    Args:
        path_or_short_name: Folder, short name of the zoo, or hub id OWNER/NAME.
        dtype: Of all parameters, whatever the files hold.
        device: Of all parameters.
        ops: Backends of the ops, as `common.ops.choose` takes them.
        compile: "auto", "on" or "off", as there.
        sliding_window: Visible keys in the layers that have a window, None for all; "checkpoint": as
            preference.json says, or else config.json.
        softcap: Cap of the attention scores, None for off; "checkpoint" as above.
        num_classes: C of a newly drawn head; a saved head has its own.
        head_seed: Seed of a newly drawn head.
        head_dropout: Probability, in training mode.
        materialise: False: nothing but the config is read and the parameters stay on the meta device, for
            ranks that receive them from another.

    Returns:
        The model; `surgery`, `hf_config`, `preference`, `decoder`, `num_classes` and `ops` say what it is.

    Raises:
        ValueError: No such checkpoint or backend; an unsupported architecture or setting; a file that is
            missing, truncated or half-written; a tensor that is missing, unexpected, misshapen or not finite.
    """
    folder = find_checkpoint(path_or_short_name, weights=materialise)
    config = read_config(folder)
    preference = read_preference(folder)
    decoder = FAMILIES[config.model_type].read(config, dtype)
    asked = {"sliding_window": sliding_window, "softcap": softcap}
    decoder = replace(decoder, **_policy(decoder, preference, asked, config.model_type))
    chosen = choose(
        ops,
        compile=compile,
        device=device,
        dtype=dtype,
        head_dim=decoder.head_dim,
        softcap=decoder.softcap,
        window=decoder.sliding_window,
    )
    with torch.device("meta"):
        model = PreferenceModel(
            decoder,
            num_classes=num_classes if preference is None else preference["num_classes"],
            dropout=head_dropout,
            ops=chosen,
        )
    model.hf_config, model.preference = config, preference
    model.to(dtype).eval()
    model.surgery = _fill(model, folder, dtype, device, head_seed) if materialise else Surgery()
    return model


def read_preference(folder: Path) -> dict | None:
    """preference.json; None for a published backbone. ValueError where it is not whole."""
    path = folder / "preference.json"
    if not path.exists():
        return None
    preference = read_json(path)
    _check_preference(path, preference)
    return preference


def _check_preference(path: Path, preference: dict) -> None:
    """ValueError unless every field that any code reads is there and fits."""
    num_classes = preference.get("num_classes")
    rules = {
        "num_classes": COUNT,
        "head_hash": SHA256,
        "sliding_window": or_null(SIZE),
        "softcap": or_null(POSITIVE),
        "embedding_scale": POSITIVE,
        "stage": TEXT,
        "model": TEXT,
        "classes": list_of(TEXT, num_classes),
        "formats": list_of(TEXT),
        "prompt.template_hash": SHA256,
        "prompt.prompt_hash": SHA256,
        "prompt.instruction": TEXT,
        "prompt.conversation_tokens": SIZE,
        "label_prior": list_of(number(0, 1), num_classes),
        "lineage.train": TEXT,
        "lineage.held_out": or_null(TEXT),
    }
    way_out = "take the folder as it was saved, with the version of this project that saved it"
    check_fields(path, preference, rules, way_out=way_out)


def _policy(decoder: Decoder, preference: dict | None, asked: dict[str, Any], family: str) -> dict[str, Any]:
    """Window, softcap, embedding scale: what was asked for, or else preference.json, or else config.json."""
    asked = {name: value for name, value in asked.items() if value != "checkpoint"}
    for name, value in asked.items():
        if value is not None and name not in decoder.options:
            raise ValueError(
                f"{name} = {value} was asked for, but a {family} checkpoint has none; leave it out"
            )
        if value is not None and value <= 0:
            raise ValueError(f"{name} = {value} must be positive; None switches it off")
    return {name: preference[name] for name in POLICY if preference is not None} | asked


def _fill(
    model: PreferenceModel, folder: Path, dtype: torch.dtype, device: torch.device | str, head_seed: int
) -> Surgery:
    """Gives every parameter its value: from the files, and a newly drawn head where they hold none."""
    expected, head = dict(model.named_parameters()), {}
    if model.preference is None:
        expected = {name: value for name, value in expected.items() if not name.startswith("head.")}
    tensors, dropped, stored_head = read_weights(folder, expected, dtype=dtype, device=device)
    if model.preference is None:  # drawn now that the files have shown the width
        head = initial_head(
            hidden_size=model.hf_config.hidden_size, num_classes=model.num_classes, seed=head_seed
        )
    found_hash = head_hash(head or stored_head)
    if model.preference is not None and found_hash != model.preference["head_hash"]:
        raise ValueError(
            f"{folder}: the head's weights hash to {found_hash}, preference.json says "
            f"{model.preference['head_hash']}; the files do not belong together: copy the whole folder "
            "again, or give its stage's command again"
        )
    initial = {name: value.to(device, dtype) for name, value in head.items()}
    model.load_state_dict(tensors | initial, strict=True, assign=True)
    assert not any(parameter.is_meta for parameter in model.parameters())
    return Surgery(
        taken=tuple(sorted(tensors)), dropped=tuple(dropped), initialised=tuple(head), head_hash=found_hash
    )


def save_checkpoint(
    folder: Path | str,
    *,
    model: PreferenceModel,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    tokenizer: Any,
    preference: dict,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a checkpoint folder that `load_model` reads back bit for bit.

    Other files of the folder stay. Each file is replaced atomically; preference.json goes first and comes
    back last, so that an interrupted save is an error to load and never a mixture of two checkpoints.

    Args:
        folder: Made when absent.
        model: The unwrapped model.
        state_dict: Full tensors to save in place of the model's own, as gathered under FSDP.
        tokenizer: transformers tokenizer.
        preference: Further content of preference.json, as `read_preference` expects it; `sliding_window`,
            `softcap`, `embedding_scale`, `num_classes` and `head_hash` are the model's.
        max_shard_bytes: Most bytes per weight file.

    Raises:
        ValueError: The folder cannot be written, the disk is full, or `preference` does not fit the model.
    """
    folder = Path(folder)
    tensors = model.state_dict() if state_dict is None else state_dict
    assert set(tensors) == set(model.state_dict()), "state_dict holds the names of another model"
    content = preference | {name: getattr(model.decoder, name) for name in POLICY}
    content |= {"num_classes": model.num_classes, "head_hash": head_hash(tensors)}
    json.dumps(content, allow_nan=False)  # what cannot be read again is refused before anything is touched
    _check_preference(folder / "preference.json", content)
    try:
        (folder / "preference.json").unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        _write_config_and_tokenizer(folder, model.hf_config, tokenizer, next(iter(tensors.values())).dtype)
        write_weights(folder, tensors, max_shard_bytes=max_shard_bytes)
    except OSError as error:
        raise ValueError(
            f"cannot write the checkpoint {folder}: {error.strerror or error}. "
            "Free some space or choose a folder that you may write to."
        ) from error
    write_json(folder / "preference.json", content)


def _write_config_and_tokenizer(folder: Path, config: Any, tokenizer: Any, dtype: torch.dtype) -> None:
    config = copy.deepcopy(config)
    config.dtype = dtype
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary_folder:
        config.save_pretrained(temporary_folder)
        try:
            tokenizer.save_pretrained(temporary_folder)
        except Exception as error:  # on a full disk tokenizers raises a bare one
            raise OSError(str(error)) from error
        for file in sorted(path for path in Path(temporary_folder).rglob("*") if path.is_file()):
            with replacing(folder / file.relative_to(temporary_folder)) as temporary:
                shutil.copyfile(file, temporary)


def checkpoint_hash(folder: Path) -> str:
    """Identity of a checkpoint: every file that is read of it, wherever the folder lies."""
    return text_hash(*(f"{name} {known_hash(folder / name)}" for name in checkpoint_files(folder)))
