"""safetensors files in, tensors out, with every discrepancy named; and the way back."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.files import confined, replacing, write_json
from common.models.zoo import AGAIN, INDEX, SINGLE, weight_files, weight_map

DROPPED = (  # published tensors that a preference model has no use for
    "lm_head.*",  # language model
    "score.*",  # stock classification head
    "regression_layer.*",  # ArmoRM: 19 reward objectives
    "reward_transform_matrix",  # ArmoRM
    "gating.*",  # ArmoRM: mixture over the objectives
    "*.rotary_emb.inv_freq",  # a constant that old checkpoints store
)

TOGETHER = "take config.json and weights from one place"
RESAVE = (
    "in Python, transformers.AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW) writes a folder "
    "NEW that is read here; copy the tokenizer's files there too"
)
MERGE = (
    "merge the adapter into its base first: in Python, peft.AutoPeftModelForCausalLM.from_pretrained(OLD)"
    ".merge_and_unload().save_pretrained(NEW), and copy the tokenizer's files to NEW"
)
UNQUANTISED = "quantised checkpoints are not read: take the unquantised one that it was made from"
UNFINISHED = "preference.json is missing: the checkpoint was not saved or copied whole; do that again"

OTHER_FORMATS = {  # what may lie in a folder without config.json or weights -> the way out
    "adapter_*": f"the folder holds an adapter alone: {MERGE}",
    "*.gguf": "GGUF files are not read: take the safetensors checkpoint that they were made from",
    "pytorch_model*.bin*": f"pickled weights are not opened here: {RESAVE}",
}
UNEXPECTED = {  # names of tensors that no model here has -> the way out, the more particular first
    "head.dense.* head.out.*": f"{UNFINISHED}, by its stage's command or from its folder",
    "*lora_*": f"it belongs to an adapter: {MERGE}",
    "*v_head.* *value_head* *reward_head* *score* head.* classifier.*": f"a reward head: {RESAVE}",
    "*.qweight *.qzeros *.scales *.g_idx *.SCB *.absmax *quant_* *_scale*": UNQUANTISED,
    "*.bias": "layers with biases are not computed here: take a checkpoint that has none",
    "layers.* embed_tokens.* norm.*": f"the backbone was saved without the prefix model.: {RESAVE}",
}


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
    index = weight_map(folder)
    if not index and not (folder / SINGLE).is_file():
        raise ValueError(f"{folder / SINGLE} cannot be read: it is missing; {instead(folder)}")
    tensors, dropped, head = {}, [], {}
    for path in [confined(folder, file) for file in weight_files(folder)]:
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
            f"belong to this config.json; {AGAIN}"
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
            f"{path} cannot be read: {error}. It is truncated or no safetensors file; {AGAIN}"
        ) from error


def instead(folder: Path) -> str:
    """The way out for a folder without config.json or without weights, by what else it holds."""
    found = (way_out for pattern, way_out in OTHER_FORMATS.items() if any(folder.glob(pattern)))
    return next(found, f"{AGAIN}; where only pytorch_model.bin is published, {RESAVE}")


def _check_stored(path: Path, name: str, stored: torch.Tensor, expected: Mapping[str, torch.Tensor]) -> None:
    if name not in expected:
        cases = (way for cases, way in UNEXPECTED.items() if any(fnmatchcase(name, c) for c in cases.split()))
        reason = next(cases, f"no such tensor is computed here: take another checkpoint, or {TOGETHER}")
        raise ValueError(f"{path}: unexpected tensor {name} of shape {list(stored.shape)}; {reason}")
    if stored.shape != expected[name].shape:
        raise ValueError(
            f"{path}: tensor {name} has shape {list(stored.shape)}, config.json expects "
            f"{list(expected[name].shape)}; the files do not belong together: {TOGETHER}"
        )
    if not stored.is_floating_point() or stored.element_size() < 2:
        raise ValueError(
            f"{path}: tensor {name} is {stored.dtype}, expected a floating dtype of 16 bits or more; "
            f"{UNQUANTISED}"
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
