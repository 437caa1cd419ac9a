"""Attention by PyTorch's FlexAttention: softcap and window, nothing to build, wherever Triton compiles.

Its mask comes straight from the boundaries. In packed order the keys that a query sees are one run, and both
ends of the run only grow from query to query: four looked-up ends say of a whole block of queries by keys
whether some or all of it is visible.

Shape suffixes: T packed tokens (queries and keys may differ in number), N query heads, K key/value heads, H
head width, B blocks of queries, E blocks of keys.
"""

import functools
from typing import TYPE_CHECKING

import torch

from common.ops.backend import Asked, compiled

if TYPE_CHECKING:  # it imports the compiler, which takes a second that most commands do not need
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Queries, and keys, of a block of the mask: FlexAttention's own default."""
MIN_HEAD_DIM = 16


def attention_flex(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """As `common.ops.attention.attention`; compiled at the first call, for all lengths."""
    first_T, last_T = visible_keys(cu_seqlens_q, cu_seqlens_k, len(q_TNH), window)
    mask = block_mask(first_T, last_T, len(k_TKH))
    with torch._dynamo.config.patch(specialize_float=True):  # scale and softcap are constants
        return _compiled()(q_TNH, k_TKH, v_TKH, mask, scale, softcap)


@functools.cache
def _compiled():
    return compiled(_attend)


def _attend(q_TNH, k_TKH, v_TKH, mask, scale, softcap):
    from torch.nn.attention.flex_attention import flex_attention

    def capped(score, batch, head, query, key):
        return softcap * torch.tanh(score / softcap)

    out_1NTH = flex_attention(
        *(x.transpose(0, 1)[None] for x in (q_TNH, k_TKH, v_TKH)),
        score_mod=None if softcap is None else capped,
        block_mask=mask,
        scale=scale,
        enable_gqa=True,
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},  # its kernel for few queries has no gradients
    )
    return out_1NTH[0].transpose(0, 1)


def visible_keys(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, num_queries: int, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last packed key that each query sees, int64 [T] each; both only grow along the queries.

    Example: queries of lengths 1, 2 on keys of lengths 5, 3 -> first [0, 5, 5], last [4, 6, 7].
    """
    query_T = torch.arange(num_queries, device=cu_seqlens_q.device)
    end_T = torch.bucketize(query_T, cu_seqlens_q, right=True)  # of the query's sequence, in the boundaries
    last_T = cu_seqlens_k[end_T] - cu_seqlens_q[end_T] + query_T
    first_T = cu_seqlens_k[end_T - 1].long()
    return first_T if window is None else first_T.maximum(last_T - window + 1), last_T


def block_mask(first_T: torch.Tensor, last_T: torch.Tensor, num_keys: int) -> "BlockMask":
    """Which blocks of keys a block of queries sees in part or whole, from what its first and last query see.

    Args:
        first_T: First key that each query sees, as of `visible_keys`.
        last_T: Last one.
        num_keys: Packed keys.
    """
    from torch.nn.attention.flex_attention import BlockMask

    num_queries = len(first_T)
    start_B = torch.arange(0, num_queries, BLOCK, device=first_T.device)
    final_B = (start_B + BLOCK - 1).clamp(max=num_queries - 1)
    low_E = torch.arange(0, num_keys, BLOCK, device=first_T.device)
    high_E = low_E + BLOCK - 1
    some_BE = (high_E >= first_T[start_B, None]) & (low_E <= last_T[final_B, None])
    all_BE = (low_E >= first_T[final_B, None]) & (high_E <= last_T[start_B, None])

    def visible(batch, head, query, key):
        return (first_T[query] <= key) & (key <= last_T[query])

    return BlockMask.from_kv_blocks(
        *_listed(some_BE & ~all_BE), *_listed(all_BE), BLOCK, visible, seq_lengths=(num_queries, num_keys)
    )


def _listed(is_BE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of true columns of each row, and their indices before the others: int32 [1, 1, B(, E)]."""
    order_BE = is_BE.int().argsort(dim=-1, descending=True, stable=True)
    return is_BE.sum(-1, dtype=torch.int32)[None, None], order_BE.int()[None, None]


def flex_refuses(asked: Asked) -> str | None:
    """Why FlexAttention cannot compute what is asked, in words; None where it can."""
    if asked.device.type != "cuda":
        return f"has no gradients but on a GPU, the model is on {asked.device.type}"
    if (capability := torch.cuda.get_device_capability(asked.device)) < (8, 0):
        return "needs compute capability 8.0 (Ampere), this card has {}.{}".format(*capability)
    if asked.head_dim < MIN_HEAD_DIM:
        return f"takes head widths from {MIN_HEAD_DIM}, {asked.head_dim} is asked for"
    return None if asked.compiles else "is compiled, and compilation is off (--compile on)"
