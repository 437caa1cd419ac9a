"""Decoder families as data: what a config.json says, in the terms of the one decoder that computes them all.

A further family is a reader here, and its differences are fields of `Decoder`; nothing else knows its name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig

from common.files import Rule, check_fields, list_of, number, or_null, read_json
from common.models.weights import UNQUANTISED, instead
from common.models.zoo import AGAIN


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Sizes of a decoder, and in what its layers differ from those of others."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    eps: float
    """Of the norms, added to the mean square."""
    rope_theta: float
    """Base of the rotary frequencies."""
    scale: float
    """Factor of the attention scores."""
    windowed: tuple[bool, ...]
    """One entry a layer: whether `sliding_window` holds there."""
    activation: Literal["gelu_tanh", "silu"]
    unit_offset: bool
    """Norms multiply by 1 + weight in fp32, instead of by the weight in the dtype of x."""
    norms_after: bool
    """A norm after each sublayer too, before its result is added to the residual."""
    options: tuple[str, ...] = ()
    """Which of the following may be asked for otherwise than config.json says."""
    sliding_window: int | None = None
    """Visible keys in the windowed layers; None is all."""
    softcap: float | None = None
    """Cap of the attention scores; None is off."""
    embedding_scale: float = 1.0
    """Factor of the embeddings."""


def read_gemma2(config: Gemma2Config, dtype: torch.dtype) -> Decoder:
    """Gemma 2: norms before and after each sublayer, softcapped scores, a window in every other layer."""
    _require(config, attention_bias=False, attention_dropout=0.0, use_bidirectional_attention=False)
    _require(config, hidden_activation="gelu_pytorch_tanh")
    return Decoder(
        **_sizes(config),
        scale=config.query_pre_attn_scalar**-0.5,
        windowed=tuple(kind == "sliding_attention" for kind in config.layer_types),
        activation="gelu_tanh",
        unit_offset=True,
        norms_after=True,
        options=("sliding_window", "softcap"),
        sliding_window=config.sliding_window,
        softcap=config.attn_logit_softcapping,
        # sqrt(D) in the dtype of the weights: 59.75 in bf16 for D = 3584, 59.875 in fp16.
        embedding_scale=torch.tensor(config.hidden_size**0.5, dtype=dtype).item(),
    )


def read_llama(config: LlamaConfig, dtype: torch.dtype) -> Decoder:
    """Llama 3: one norm before each sublayer, full causal attention."""
    _require(config, attention_bias=False, mlp_bias=False, attention_dropout=0.0, hidden_act="silu")
    return Decoder(
        **_sizes(config),
        scale=config.head_dim**-0.5,
        windowed=(False,) * config.num_hidden_layers,
        activation="silu",
        unit_offset=False,
        norms_after=False,
    )


class Family(NamedTuple):
    """A `model_type` of config.json."""

    config: type[PreTrainedConfig]
    read: Callable[[Any, torch.dtype], Decoder]
    """(config, dtype of the weights) -> Decoder; ValueError where the config asks for something else."""


FAMILIES = {"gemma2": Family(Gemma2Config, read_gemma2), "llama": Family(LlamaConfig, read_llama)}


COUNT = number(1, 1_000, whole=True)
"""Of layers or labels; the deepest published decoders have about 130 layers."""
SIZE = number(1, 2**24, whole=True)
POSITIVE = number(1e-30, 1e30)
KIND: Rule = (lambda kind: kind in ("full_attention", "sliding_attention"), "full_ or sliding_attention")


def read_config(folder: Path) -> PreTrainedConfig:
    """Reads config.json.

    Raises:
        ValueError: It is absent, broken, or of an architecture that is not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} cannot be read: it is missing; {instead(folder)}")
    found = read_json(path)
    model_type = found.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"{path} has model_type {model_type!r:.80}; supported are {', '.join(FAMILIES)}: take one of "
            "these, or a newer version of this project"
        )
    if found.get("quantization_config"):
        raise ValueError(f"{path} has a quantization_config; {UNQUANTISED}")
    lists = {name: COUNT for name in ("num_hidden_layers", "num_labels") if found.get(name) is not None}
    check_fields(path, found, lists, way_out=AGAIN)  # transformers makes lists of these lengths
    try:
        # Not by from_pretrained, which may go on to other files; auto_map names foreign code.
        found = {name: value for name, value in found.items() if name != "auto_map"}
        config = FAMILIES[model_type].config.from_dict(found)
        found = config.to_dict()
    except Exception as error:  # a broken file makes the library raise anything
        raise ValueError(f"{path} is not a valid {model_type} config: {error}; {AGAIN}") from error
    check_fields(path, found, _rules(found), way_out=AGAIN)
    return config


def _rules(found: dict) -> dict[str, Rule]:
    """What the fields of a config may hold; a family does not have them all."""
    key_value_heads, layers = found.get("num_key_value_heads"), found.get("num_hidden_layers")
    rules = {
        **dict.fromkeys(("vocab_size", "intermediate_size", "num_key_value_heads"), SIZE),
        "hidden_size": number(2, 2**24, whole=True),
        "num_hidden_layers": COUNT,
        "num_attention_heads": (
            lambda heads: SIZE[0](heads) and heads % key_value_heads == 0,
            f"a multiple of num_key_value_heads = {key_value_heads}",
        ),
        "head_dim": (lambda width: SIZE[0](width) and width % 2 == 0, f"{SIZE[1]}, and even"),
        "rms_norm_eps": POSITIVE,
        "rope_parameters.rope_theta": POSITIVE,
        "query_pre_attn_scalar": POSITIVE,
        "sliding_window": or_null(SIZE),
        "attn_logit_softcapping": or_null(POSITIVE),
        "layer_types": or_null(list_of(KIND, layers)),
    }
    return {name: rule for name, rule in rules.items() if name.split(".")[0] in found}


def _sizes(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that all families call alike."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_key_value_heads", "head_dim")
    return {
        **{name: getattr(config, name) for name in names},
        "num_heads": config.num_attention_heads,
        "eps": config.rms_norm_eps,
        "rope_theta": _rope_theta(config),
    }


def _require(config: PreTrainedConfig, **expected: object) -> None:
    """ValueError where a field asks for something that is not computed; False, 0 and None agree."""
    for name, value in expected.items():
        found = getattr(config, name, value)
        if (found or None) != (value or None):
            raise ValueError(
                f"config.json has {name} = {found!r}, only {value!r} is supported; take a checkpoint with "
                "that, or a newer version of this project"
            )


def _rope_theta(config: PreTrainedConfig) -> float:
    """Base of the rotary frequencies, from `rope_parameters` (transformers 5); ValueError if it is scaled."""
    parameters = config.rope_parameters
    rope_type = parameters.get("rope_type", "default")
    if rope_type != "default":
        raise ValueError(
            f"config.json has rope type {rope_type!r}, only 'default' is supported; take a checkpoint with "
            "that (such as Llama 3, not 3.1), or a newer version of this project"
        )
    return float(parameters["rope_theta"])
