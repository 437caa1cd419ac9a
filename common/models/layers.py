"""The one decoder of all families. It runs on packed sequences only: no pad token, no mask, no buffer.

Modules take the `Decoder` that their family's reader made, so that a difference between families is a field
there and the one place that uses it. They may be built on the meta device. A child's weight is only ever read
by the child's own forward: that is where FSDP gathers it.

Shape suffixes: T packed tokens, S sequences, U rows that leave a layer (T, or S in the last layer), D model
width, N query heads, K key/value heads, H head width, R rotation frequencies (H / 2), F feed-forward width.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.models.families import Decoder
from common.ops import Ops
from common.ops.rotary import rotary_tables
from common.ops.weight_gradient import Embedding, Linear


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
    """RMS normalisation with its learned scale, which loading fills."""

    def __init__(self, decoder: Decoder, *, ops: Ops) -> None:
        super().__init__()
        self.eps, self.unit_offset, self.ops = decoder.eps, decoder.unit_offset, ops
        self.weight = nn.Parameter(torch.empty(decoder.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        return self.ops.rms_norm(x, self.weight, eps=self.eps, unit_offset=self.unit_offset)


class Attention(nn.Module):
    """Projections, rotary embedding and grouped-query attention of one layer."""

    def __init__(self, decoder: Decoder, *, window: int | None, last_token_only: bool, ops: Ops) -> None:
        super().__init__()
        self.head_dim, self.scale, self.softcap = decoder.head_dim, decoder.scale, decoder.softcap
        self.window, self.last_token_only, self.ops = window, last_token_only, ops
        width = decoder.num_heads * decoder.head_dim
        key_value_width = decoder.num_key_value_heads * decoder.head_dim
        self.q_proj = Linear(decoder.hidden_size, width)
        self.k_proj = Linear(decoder.hidden_size, key_value_width)
        self.v_proj = Linear(decoder.hidden_size, key_value_width)
        self.o_proj = Linear(width, decoder.hidden_size)

    def project(
        self, hidden_TD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, last_S: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden_TD -> q_UNH, k_TKH, v_TKH, rotated; with `last_token_only` the rows `last_S` alone ask."""
        heads, asking = (-1, self.head_dim), (hidden_TD, cos_TR, sin_TR)
        if self.last_token_only:
            asking = tuple(x.index_select(0, last_S) for x in asking)
        q_UNH = self.ops.rotary(self.q_proj(asking[0]).unflatten(-1, heads), *asking[1:])
        k_TKH = self.ops.rotary(self.k_proj(hidden_TD).unflatten(-1, heads), cos_TR, sin_TR)
        return q_UNH, k_TKH, self.v_proj(hidden_TD).unflatten(-1, heads)

    def attend(
        self, q_UNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, layout: Layout
    ) -> torch.Tensor:
        """What the queries find -> found_UNH."""
        cu_seqlens_q, max_seqlen_q = layout.cu_seqlens, layout.max_seqlen
        if self.last_token_only:
            cu_seqlens_q = torch.arange(len(cu_seqlens_q), dtype=torch.int32, device=cu_seqlens_q.device)
            max_seqlen_q = 1
        return self.ops.attention(
            q_UNH,
            k_TKH,
            v_TKH,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=layout.cu_seqlens,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=layout.max_seqlen,
            scale=self.scale,
            softcap=self.softcap,
            window=self.window,
        )


class GatedMLP(nn.Module):
    """Feed-forward block: down(activation(gate(x)) * up(x))."""

    def __init__(self, decoder: Decoder, *, ops: Ops) -> None:
        super().__init__()
        self.activation, self.ops = decoder.activation, ops
        self.gate_proj = Linear(decoder.hidden_size, decoder.intermediate_size)
        self.up_proj = Linear(decoder.hidden_size, decoder.intermediate_size)
        self.down_proj = Linear(decoder.intermediate_size, decoder.hidden_size)

    def forward(self, hidden_UD: torch.Tensor) -> torch.Tensor:
        """hidden_UD -> out_UD."""
        gated_UF = self.ops.gated_activation(
            self.gate_proj(hidden_UD), self.up_proj(hidden_UD), activation=self.activation
        )
        return self.down_proj(gated_UF)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `norms_after` each sublayer's result is normed too.

    The names of the norms are those of the published checkpoints: what Llama calls post_attention_layernorm
    stands before the MLP, what Gemma 2 calls so stands after the attention.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        window: int | None,
        last_token_only: bool,
        ops: Ops,
    ) -> None:
        super().__init__()
        self.last_token_only = last_token_only
        self.self_attn = Attention(decoder, window=window, last_token_only=last_token_only, ops=ops)
        self.mlp = GatedMLP(decoder, ops=ops)
        self.input_layernorm = RMSNorm(decoder, ops=ops)
        self.post_attention_layernorm = RMSNorm(decoder, ops=ops)
        self.norms_after = decoder.norms_after
        if decoder.norms_after:
            self.pre_feedforward_layernorm = RMSNorm(decoder, ops=ops)
            self.post_feedforward_layernorm = RMSNorm(decoder, ops=ops)
        # The last layer's few rows are not worth a compilation of their own.
        fuse = (lambda half: half) if last_token_only else ops.fuse
        self.before, self.after = fuse(type(self)._before_attention), fuse(type(self)._after_attention)

    def forward(self, hidden_TD: torch.Tensor, layout: Layout, recompute: bool = False) -> torch.Tensor:
        """hidden_TD -> hidden_UD; with `recompute` nothing between is kept for the backward pass."""
        # Inside forward, so that FSDP gathers the weights around the recomputation and not within it.
        if recompute:
            return checkpoint(self._block, hidden_TD, layout, use_reentrant=False, preserve_rng_state=False)
        return self._block(hidden_TD, layout)

    def _block(self, hidden_TD: torch.Tensor, layout: Layout) -> torch.Tensor:
        q_UNH, k_TKH, v_TKH = self.before(self, hidden_TD, layout.cos_TR, layout.sin_TR, layout.last_S)
        found_UNH = self.self_attn.attend(q_UNH, k_TKH, v_TKH, layout)
        hidden_UD = hidden_TD.index_select(0, layout.last_S) if self.last_token_only else hidden_TD
        return self.after(self, hidden_UD, found_UNH)

    def _before_attention(self, hidden_TD, cos_TR, sin_TR, last_S):
        return self.self_attn.project(self.input_layernorm(hidden_TD), cos_TR, sin_TR, last_S)

    def _after_attention(self, hidden_UD, found_UNH):
        attended_UD = self.self_attn.o_proj(found_UNH.flatten(1))
        if not self.norms_after:
            hidden_UD = hidden_UD + attended_UD
            return hidden_UD + self.mlp(self.post_attention_layernorm(hidden_UD))
        hidden_UD = hidden_UD + self.post_attention_layernorm(attended_UD)
        fed_UD = self.mlp(self.pre_feedforward_layernorm(hidden_UD))
        return hidden_UD + self.post_feedforward_layernorm(fed_UD)


class Backbone(nn.Module):
    """Embedding, decoder layers and final norm, with the state-dict names of the published checkpoints."""

    def __init__(self, decoder: Decoder, *, ops: Ops) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = decoder.head_dim, decoder.rope_theta
        self.embedding_scale = decoder.embedding_scale
        self.embed_tokens = Embedding(decoder.vocab_size, decoder.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(
                decoder,
                window=decoder.sliding_window if is_windowed else None,
                last_token_only=number == len(decoder.windowed),
                ops=ops,
            )
            for number, is_windowed in enumerate(decoder.windowed, start=1)
        )
        self.norm = RMSNorm(decoder, ops=ops)

    def forward(
        self,
        input_ids_T: torch.Tensor,
        position_ids_T: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        *,
        recompute: int = 0,
    ) -> torch.Tensor:
        """Packed token ids -> hidden_SD, the normalised state of each sequence's last token.

        The first `recompute` layers compute their activations again in the backward pass.
        """
        hidden_TD = self.embed_tokens(input_ids_T)
        if self.embedding_scale != 1.0:
            hidden_TD = hidden_TD * self.embedding_scale
        cos_TR, sin_TR = rotary_tables(position_ids_T, theta=self.rope_theta, head_dim=self.head_dim)
        layout = Layout(cos_TR, sin_TR, cu_seqlens, max_seqlen, last_S=cu_seqlens[1:].long() - 1)
        for number, layer in enumerate(self.layers):  # the last one returns S rows
            hidden_TD = layer(hidden_TD, layout, recompute=number < recompute)
        return self.norm(hidden_TD)
