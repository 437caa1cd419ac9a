"""The model that every stage trains and every bundle serves: packed token ids in, class logits out.

Shape suffixes: S sequences, C classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from common.models.head import PreferenceHead
from common.models.layers import Backbone

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from common.batching import PackedBatch
    from common.models.checkpoint import Surgery


class PreferenceModel(nn.Module):
    """A published backbone (`model.`) with a preference head (`head.`).

    `base_model_prefix`, `_no_split_modules` and `get_input_embeddings` are what Accelerate asks for to shard
    decoder layers, embedding and final norm in groups of their own.
    """

    base_model_prefix = "model"

    sliding_window: int | None
    """Visible keys in the layers that have a window; None is off."""
    softcap: float | None
    """Cap of the attention scores; None is off."""
    num_classes: int
    """C."""
    hf_config: PreTrainedConfig
    """The checkpoint's config.json."""
    preference: dict | None
    """The checkpoint's preference.json; None for a published backbone."""
    surgery: Surgery
    """What loading took, dropped and newly initialised."""

    def __init__(
        self, *, model: Backbone, head: PreferenceHead, sliding_window: int | None, softcap: float | None
    ) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.sliding_window, self.softcap, self.num_classes = sliding_window, softcap, head.out.out_features
        self._no_split_modules = sorted({type(layer).__name__ for layer in model.layers})

    @property
    def embedding_scale(self) -> float:
        """Factor of the embeddings, a plain number that does not depend on the dtype served with."""
        return self.model.embedding_scale

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.model.embed_tokens

    def forward(self, packed: PackedBatch) -> torch.Tensor:
        """PackedBatch of S sequences -> logits_SC, float32."""
        hidden_SD = self.model(
            packed.input_ids_T, packed.position_ids_T, packed.cu_seqlens, packed.max_seqlen
        )
        return self.head(hidden_SD).float()
