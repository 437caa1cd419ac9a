"""Llama 3: one norm before each sublayer, full causal attention.

Shape suffixes: T packed tokens, U rows that leave a layer (T, or S in the last layer), D model width.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.models.layers import Attention, Backbone, GatedMLP, Layout, RMSNorm, require, rope_theta


class LlamaDecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        eps: float,
        last_token_only: bool,
        activation_checkpointing: bool,
        ops: str,
    ) -> None:
        super().__init__()
        self.last_token_only, self.activation_checkpointing = last_token_only, activation_checkpointing
        self.self_attn = Attention(
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            softcap=None,
            window=None,
            last_token_only=last_token_only,
            ops=ops,
        )
        self.mlp = GatedMLP(
            hidden_size=hidden_size, intermediate_size=intermediate_size, activation="silu", ops=ops
        )
        self.input_layernorm = RMSNorm(hidden_size=hidden_size, eps=eps, unit_offset=False, ops=ops)
        self.post_attention_layernorm = RMSNorm(hidden_size=hidden_size, eps=eps, unit_offset=False, ops=ops)

    def forward(self, hidden_TD: torch.Tensor, layout: Layout) -> torch.Tensor:
        """hidden_TD -> hidden_UD."""
        # Inside forward, so that FSDP gathers the weights around the recomputation and not within it.
        if self.activation_checkpointing and self.training:
            return checkpoint(self._block, hidden_TD, layout, use_reentrant=False, preserve_rng_state=False)
        return self._block(hidden_TD, layout)

    def _block(self, hidden_TD: torch.Tensor, layout: Layout) -> torch.Tensor:
        attended_UD = self.self_attn(self.input_layernorm(hidden_TD), layout)
        hidden_UD = hidden_TD.index_select(0, layout.last_S) if self.last_token_only else hidden_TD
        hidden_UD = hidden_UD + attended_UD
        return hidden_UD + self.mlp(self.post_attention_layernorm(hidden_UD))


def llama_backbone(config: object, *, activation_checkpointing: bool, ops: str) -> Backbone:
    """The backbone that a Llama config.json describes.

    Args:
        config: transformers' LlamaConfig.
        activation_checkpointing: Recompute each layer's activations in the backward pass.
        ops: Backend of the ops.

    Raises:
        ValueError: The config asks for something that this model does not compute.
    """
    require(config, attention_bias=False, mlp_bias=False, attention_dropout=0.0, hidden_act="silu")
    last = config.num_hidden_layers - 1
    layers = [
        LlamaDecoderLayer(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            last_token_only=index == last,
            activation_checkpointing=activation_checkpointing,
            ops=ops,
        )
        for index in range(config.num_hidden_layers)
    ]
    return Backbone(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        head_dim=config.head_dim,
        rope_theta=rope_theta(config),
        embedding_scale=1.0,
        layers=layers,
        norm=RMSNorm(hidden_size=config.hidden_size, eps=config.rms_norm_eps, unit_offset=False, ops=ops),
    )
