"""Causal attention over packed sequences, with grouped queries, score softcap and sliding window.

Shape suffixes: T packed tokens (queries and keys may differ in number), Q and L queries and keys of one
sequence, N query heads, K key/value heads, G query heads per key/value head (N / K), R their queries
(G x Q), H head width.
"""

import torch
import torch.nn.functional as F


def attention(
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
    """Attention of each sequence's queries to its own keys, causal and aligned at the end of the sequence.

    A sequence with Q queries and L keys (Q <= L) has its query i at key position L - Q + i: Q = L is ordinary
    causal attention, Q = 1 is the last token looking at everything.

    Args:
        q_TNH: Queries, rotated, not scaled.
        k_TKH: Keys, rotated; K divides N, query head n reads key/value head n // (N / K).
        v_TKH: Values.
        cu_seqlens_q: int32, S + 1 boundaries of the queries (lengths 5, 3 -> [0, 5, 8]).
        cu_seqlens_k: int32, S + 1 boundaries of the keys and values.
        max_seqlen_q: Most queries of one sequence, a Python int.
        max_seqlen_k: Most keys of one sequence, a Python int.
        scale: Factor of the scores.
        softcap: Scores become softcap * tanh(score / softcap); None is off.
        window: Number of visible keys, the query's own position included; None is all.

    Returns:
        Tensor of the shape and dtype of `q_TNH`; sequence by sequence, softmax in fp32.
    """
    # One device synchronisation a call. Splitting, unlike slicing, has one concatenation as its gradient.
    lengths_q, lengths_k = torch.stack([cu_seqlens_q.diff(), cu_seqlens_k.diff()]).tolist()
    assert all(0 < Q <= L for Q, L in zip(lengths_q, lengths_k, strict=True)), (lengths_q, lengths_k)
    mask_QL = _causal_mask(max_seqlen_q, max_seqlen_k, window, q_TNH.device)
    outputs = []
    for q_QNH, k_LKH, v_LKH in zip(
        q_TNH.split(lengths_q), k_TKH.split(lengths_k), v_TKH.split(lengths_k), strict=True
    ):
        corner_QL = mask_QL[-len(q_QNH) :, -len(k_LKH) :]
        if softcap is None:
            outputs.append(_attend(q_QNH, k_LKH, v_LKH, corner_QL, scale))
        else:
            outputs.append(_attend_softcapped(q_QNH, k_LKH, v_LKH, corner_QL, scale, softcap))
    return torch.cat(outputs)


def _attend(q_QNH, k_LKH, v_LKH, mask_QL, scale):
    """One sequence, by PyTorch's own attention: on a CPU a sixth less training time than with matmuls."""
    q_1NQH, k_1KLH, v_1KLH = (x.transpose(0, 1)[None] for x in (q_QNH, k_LKH, v_LKH))
    out_1NQH = F.scaled_dot_product_attention(
        q_1NQH, k_1KLH, v_1KLH, attn_mask=mask_QL.to(q_QNH.dtype), scale=scale, enable_gqa=True
    )
    return out_1NQH[0].transpose(0, 1)


def _attend_softcapped(q_QNH, k_LKH, v_LKH, mask_QL, scale, softcap):
    """One sequence, a batched matmul over the key/value heads."""
    Q, N, H = q_QNH.shape
    L, K, _ = k_LKH.shape
    G = N // K
    # Query heads of one key/value head are stacked as rows: keys and values are never repeated in memory.
    q_KRH = q_QNH.view(Q, K, G, H).permute(1, 2, 0, 3).reshape(K, G * Q, H)
    # alpha scales inside the matmul's fp32 accumulator; with beta=0 the first argument is not read.
    scores_KRL = torch.baddbmm(
        q_QNH.new_empty(1), q_KRH, k_LKH.permute(1, 2, 0), beta=0, alpha=scale / softcap
    )
    capped_KGQL = torch.add(mask_QL, scores_KRL.float().tanh().view(K, G, Q, L), alpha=softcap)
    weights_KRL = capped_KGQL.softmax(-1).to(v_LKH.dtype).view(K, G * Q, L)
    out_KRH = torch.bmm(weights_KRL, v_LKH.transpose(0, 1))
    return out_KRH.view(K, G, Q, H).permute(2, 0, 1, 3).reshape(Q, N, H)


def _causal_mask(max_seqlen_q, max_seqlen_k, window, device):
    """0 where a query sees a key, -inf elsewhere, for the longest sequence.

    Visibility depends on distances to the end alone, so a shorter sequence's mask is the bottom right corner.
    """
    position_Q = torch.arange(max_seqlen_k - max_seqlen_q, max_seqlen_k, device=device)
    distance_QL = position_Q[:, None] - torch.arange(max_seqlen_k, device=device)
    hidden_QL = distance_QL < 0
    if window is not None:
        hidden_QL |= distance_QL >= window
    return torch.zeros(hidden_QL.shape, device=device).masked_fill_(hidden_QL, float("-inf"))
