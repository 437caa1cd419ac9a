"""The model that every stage trains and every bundle serves: packed token ids in, class logits out.

Shape suffixes: S sequences, C classes.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from common.batching import PackedBatch
from common.models.families import Decoder
from common.models.head import PreferenceHead
from common.models.layers import Backbone, DecoderLayer
from common.ops import Ops


@dataclass(frozen=True, kw_only=True)
class Surgery:
    """What loading did to the checkpoint's tensors, by name."""

    taken: tuple[str, ...] = ()
    """Read from the files."""
    dropped: tuple[str, ...] = ()
    """In the files, without use here."""
    initialised: tuple[str, ...] = ()
    """Not in the files, newly drawn."""
    head_hash: str | None = None
    """sha256 of the head's float32 bytes, before any cast; None when nothing was read."""

    def __str__(self) -> str:
        if self.head_hash is None:
            return "nothing read: the model waits on the meta device"
        parts = [f"{len(self.taken)} tensors taken"]
        for what, names in (("dropped", self.dropped), ("newly initialised", self.initialised)):
            listed = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            parts.append(f"{len(names)} {what}" + (f" ({listed})" if names else ""))
        return "; ".join([*parts, f"head {self.head_hash[:12]}"])


class PreferenceModel(nn.Module):
    """A published backbone (`model.`) with a preference head (`head.`).

    `base_model_prefix`, `_no_split_modules` and `get_input_embeddings` are what Accelerate asks for to shard
    decoder layers, embedding and final norm in groups of their own.
    """

    base_model_prefix = "model"

    hf_config: PreTrainedConfig
    """The checkpoint's config.json."""
    preference: dict | None
    """The checkpoint's preference.json; None for a published backbone."""
    surgery: Surgery
    """What loading took, dropped and newly initialised."""

    def __init__(self, decoder: Decoder, *, num_classes: int, dropout: float, ops: Ops) -> None:
        super().__init__()
        self.decoder, self.num_classes, self.ops = decoder, num_classes, ops
        self.model = Backbone(decoder, ops=ops)
        self._no_split_modules = [DecoderLayer.__name__]
        self.head = PreferenceHead(hidden_size=decoder.hidden_size, num_classes=num_classes, dropout=dropout)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.model.embed_tokens

    def forward(
        self, packed: PackedBatch, *, kept_SE: torch.Tensor | None = None, recompute: int = 0
    ) -> torch.Tensor:
        """PackedBatch of S sequences -> logits_SC, float32.

        Args:
            kept_SE: What the head's dropout keeps, as of `PreferenceHead.forward`; None: no dropout.
            recompute: How many decoder layers, the first ones, keep no activations for the backward pass and
                compute them again in it: less memory, more time, the same result.
        """
        hidden_SD = self.model(
            packed.input_ids_T,
            packed.position_ids_T,
            packed.cu_seqlens,
            packed.max_seqlen,
            recompute=recompute,
        )
        return self.head(hidden_SD, kept_SE)
