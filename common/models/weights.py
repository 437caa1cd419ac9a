"""safetensors files in, tensors out, with every discrepancy named; and the way back."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.files import read_json, replacing, write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DROPPED = (  # published tensors that a preference model has no use for
    "lm_head.*",  # language model
    "score.*",  # stock classification head
    "regression_layer.*",  # ArmoRM: 19 reward objectives
    "reward_transform_matrix",  # ArmoRM
    "gating.*",  # ArmoRM: mixture over the objectives
    "*.rotary_emb.inv_freq",  # a constant that old checkpoints store
)


def read_weights(
    folder: Path, expected: Mapping[str, torch.Tensor], *, dtype: torch.dtype, device: torch.device | str
) -> tuple[dict[str, torch.Tensor], list[str], dict[str, torch.Tensor]]:
    """Reads a checkpoint's tensors one by one, straight into their final dtype and device.

    Args:
        folder: Holds model.safetensors, or shards and model.safetensors.index.json.
        expected: Parameters (of any device, meta included) by state-dict name; names and shapes are compared.
        dtype: Of the result, whatever the files hold.
        device: Of the result.

    Returns:
        The tensors by name; the names that the table `DROPPED` left out; the `head.` tensors as stored.

    Raises:
        ValueError: A file is absent, truncated or no safetensors; a tensor is missing, unexpected, misshapen,
            not a floating one, stored twice, or not finite in `dtype`.
    """
    index = _weight_map(folder)
    tensors, dropped, head = {}, [], {}
    for path in sorted({folder / file for file in index.values()} or {folder / SINGLE}):
        for name, stored in _stored_tensors(path, dropped):
            _check_stored(path, name, stored, expected)
            if name in tensors:
                raise ValueError(f"{path}: tensor {name} is stored in another file too; remove one")
            # The copy detaches CPU tensors from the file, which may change while they are in use.
            tensors[name] = stored.to(device, dtype, copy=True)
            _check_finite(path, name, tensors[name], stored.dtype)
            if name.startswith("head."):
                head[name] = stored.clone()
    missing = [name for name in expected if name not in tensors]
    if missing:
        path = folder / index.get(missing[0], INDEX if index else SINGLE)
        raise ValueError(
            f"{path}: tensor {missing[0]} of shape {list(expected[missing[0]].shape)} is missing "
            f"({len(missing)} of {len(expected)} expected tensors are); the files are incomplete or do not "
            "belong to this config.json: fetch or save the checkpoint again"
        )
    return tensors, sorted(dropped), head


def _stored_tensors(path: Path, dropped: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of one file; those of the table `DROPPED` are not read, only added to `dropped`."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if any(fnmatchcase(name, pattern) for pattern in DROPPED):
                    dropped.append(name)
                else:
                    yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}. It is missing, truncated or no safetensors file; "
            "fetch or save the checkpoint again"
        ) from error


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file, empty when everything lies in the single file."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return {}
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} has no weight_map; fetch or save the checkpoint again")
    return weight_map


def _check_stored(path: Path, name: str, stored: torch.Tensor, expected: Mapping[str, torch.Tensor]) -> None:
    if name not in expected:
        reason = (
            "this model has no such tensor: the files do not belong to this config.json; fetch or save the "
            "checkpoint again"
        )
        if name.startswith("head."):
            reason = "preference.json is missing: saving this checkpoint did not finish; save it again"
        raise ValueError(f"{path}: unexpected tensor {name} of shape {list(stored.shape)}; {reason}")
    if stored.shape != expected[name].shape:
        raise ValueError(
            f"{path}: tensor {name} has shape {list(stored.shape)}, config.json expects "
            f"{list(expected[name].shape)}; the files do not belong together"
        )
    if not stored.is_floating_point():
        raise ValueError(
            f"{path}: tensor {name} is {stored.dtype}, expected a floating dtype; "
            "quantised checkpoints are not read"
        )


def _check_finite(path: Path, name: str, tensor: torch.Tensor, stored_dtype: torch.dtype) -> None:
    # The float32 sum of weights is finite exactly when each of them is, and needs no second tensor.
    if not tensor.sum(dtype=torch.float32).isfinite():
        raise ValueError(
            f"{path}: tensor {name} ({stored_dtype}) holds NaN or infinity as {tensor.dtype}; "
            "the checkpoint is broken, or its values do not fit that dtype: load it in another one"
        )


def write_weights(folder: Path, tensors: Mapping[str, torch.Tensor], *, max_shard_bytes: int) -> None:
    """Writes model.safetensors, or shards and their index, each atomically; then removes weight files of old.

    Raises:
        ValueError: The folder cannot be written or the disk is full.
    """
    plan = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    for filename, names in plan.filename_to_tensors.items():
        try:
            with replacing(folder / filename) as temporary:
                shard = {name: tensors[name].detach().contiguous() for name in names}
                save_file(shard, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise ValueError(f"cannot write {folder / filename}: {error}; free some space") from error
    written = set(plan.filename_to_tensors)
    if plan.is_sharded:
        write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
        written.add(INDEX)
    leftovers = [*folder.glob("model*.safetensors*"), *folder.glob(".model*.safetensors*.tmp")]
    for path in leftovers:
        if path.name not in written:
            path.unlink()
