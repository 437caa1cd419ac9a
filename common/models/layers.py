"""Blocks that both model families share. They run on packed sequences only: no pad token, no mask, no buffer.

Modules may be built on the meta device. A child's weight is only ever read by the child's own forward:
that is where FSDP gathers it.

Shape suffixes: T packed tokens, S sequences, U rows that leave a layer (T, or S in the last layer), D model
width, N query heads, K key/value heads, H head width, R rotation frequencies (H / 2), F feed-forward width.
"""

from typing import Literal, NamedTuple

import torch
from torch import nn

from common.ops.attention import attention
from common.ops.gated_activation import gated_activation
from common.ops.rms_norm import rms_norm
from common.ops.rotary import rotary, rotary_tables


class Layout(NamedTuple):
    """Where the packed tokens stand: computed once a forward pass, shared by all layers."""

    cos_TR: torch.Tensor
    """float32 rotary table."""
    sin_TR: torch.Tensor
    """float32 rotary table."""
    cu_seqlens: torch.Tensor
    """int32, S + 1 boundaries of the sequences."""
    max_seqlen: int
    """Longest sequence in tokens."""
    last_S: torch.Tensor
    """int64, row of each sequence's last token."""


class RMSNorm(nn.Module):
    """`common.ops.rms_norm` with its learned scale, which starts at exactly one."""

    def __init__(self, *, hidden_size: int, eps: float, unit_offset: bool, ops: str) -> None:
        super().__init__()
        self.eps, self.unit_offset, self.ops = eps, unit_offset, ops
        self.weight = nn.Parameter(torch.zeros(hidden_size) if unit_offset else torch.ones(hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        return rms_norm(x, self.weight, eps=self.eps, unit_offset=self.unit_offset, backend=self.ops)


class Attention(nn.Module):
    """Projections, rotary embedding and grouped-query attention of one layer."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        scale: float,
        softcap: float | None,
        window: int | None,
        last_token_only: bool,
        ops: str,
    ) -> None:
        super().__init__()
        self.head_dim, self.scale, self.softcap, self.window = head_dim, scale, softcap, window
        self.last_token_only, self.ops = last_token_only, ops
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(self, hidden_TD: torch.Tensor, layout: Layout) -> torch.Tensor:
        """hidden_TD -> out_UD: every token asks, or with `last_token_only` each sequence's last one alone."""
        asking_UD, cos_UR, sin_UR = hidden_TD, layout.cos_TR, layout.sin_TR
        cu_seqlens_q, max_seqlen_q = layout.cu_seqlens, layout.max_seqlen
        if self.last_token_only:
            asking_UD, cos_UR, sin_UR = (
                x.index_select(0, layout.last_S) for x in (asking_UD, cos_UR, sin_UR)
            )
            cu_seqlens_q = torch.arange(len(cu_seqlens_q), dtype=torch.int32, device=cu_seqlens_q.device)
            max_seqlen_q = 1
        heads = (-1, self.head_dim)
        q_UNH = self.q_proj(asking_UD).unflatten(-1, heads)
        k_TKH = self.k_proj(hidden_TD).unflatten(-1, heads)
        v_TKH = self.v_proj(hidden_TD).unflatten(-1, heads)
        out_UNH = attention(
            rotary(q_UNH, cos_UR, sin_UR, backend=self.ops),
            rotary(k_TKH, layout.cos_TR, layout.sin_TR, backend=self.ops),
            v_TKH,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=layout.cu_seqlens,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=layout.max_seqlen,
            scale=self.scale,
            softcap=self.softcap,
            window=self.window,
            backend=self.ops,
        )
        return self.o_proj(out_UNH.flatten(1))


class GatedMLP(nn.Module):
    """Feed-forward block: down(activation(gate(x)) * up(x))."""

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        activation: Literal["gelu_tanh", "silu"],
        ops: str,
    ) -> None:
        super().__init__()
        self.activation, self.ops = activation, ops
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_UD: torch.Tensor) -> torch.Tensor:
        """hidden_UD -> out_UD."""
        gated_UF = gated_activation(
            self.gate_proj(hidden_UD), self.up_proj(hidden_UD), activation=self.activation, backend=self.ops
        )
        return self.down_proj(gated_UF)


class Backbone(nn.Module):
    """Embedding, decoder layers and final norm, with the state-dict names of the published checkpoints."""

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        head_dim: int,
        rope_theta: float,
        embedding_scale: float,
        layers: list[nn.Module],
        norm: RMSNorm,
    ) -> None:
        super().__init__()
        self.head_dim, self.rope_theta, self.embedding_scale = head_dim, rope_theta, embedding_scale
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(
        self,
        input_ids_T: torch.Tensor,
        position_ids_T: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
    ) -> torch.Tensor:
        """Packed token ids -> hidden_SD, the normalised state of each sequence's last token."""
        hidden_TD = self.embed_tokens(input_ids_T)
        if self.embedding_scale != 1.0:
            hidden_TD = hidden_TD * self.embedding_scale
        cos_TR, sin_TR = rotary_tables(position_ids_T, theta=self.rope_theta, head_dim=self.head_dim)
        layout = Layout(cos_TR, sin_TR, cu_seqlens, max_seqlen, last_S=cu_seqlens[1:].long() - 1)
        for layer in self.layers:  # the last one returns S rows
            hidden_TD = layer(hidden_TD, layout)
        return self.norm(hidden_TD)


def require(config: object, **expected: object) -> None:
    """Refuses a config that asks for something that these models do not compute; False, 0 and None agree.

    Raises:
        ValueError: A field of `config` differs from the value given here.
    """
    for name, value in expected.items():
        found = getattr(config, name, value)
        if (found or None) != (value or None):
            raise ValueError(
                f"config.json has {name} = {found!r}, only {value!r} is supported; choose another checkpoint"
            )


def rope_theta(config: object) -> float:
    """Base of the rotary frequencies, from `config.rope_parameters` (transformers 5).

    Raises:
        ValueError: The checkpoint scales its rotary embedding.
    """
    parameters = config.rope_parameters
    rope_type = parameters.get("rope_type", "default")
    if rope_type != "default":
        raise ValueError(
            f"config.json has rope type {rope_type!r}, only 'default' is supported; choose another checkpoint"
        )
    return float(parameters["rope_theta"])
