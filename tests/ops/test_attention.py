import itertools

import pytest
import torch

from common.ops.attention import attention

LENGTHS = {  # name -> (query lengths, key lengths)
    "causal": ([5, 1, 13], [5, 1, 13]),
    "last token": ([1, 1, 1], [5, 1, 13]),
    "suffixes": ([3, 1, 13], [7, 1, 14]),
}


def boundaries(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def dense_attention(q, k, v, lengths_q, lengths_k, scale, softcap, window):
    """One score matrix over everything, in float64, with keys and values repeated: written unlike the op."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("inh,jnh->nij", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    of_query = [
        (s, n - m + i) for s, (m, n) in enumerate(zip(lengths_q, lengths_k, strict=True)) for i in range(m)
    ]
    of_key = [(s, j) for s, n in enumerate(lengths_k) for j in range(n)]
    window = window or 10**9
    visible = torch.tensor(
        [[s == t and i - window < j <= i for t, j in of_key] for s, i in of_query], dtype=torch.bool
    )
    return torch.einsum("nij,jnh->inh", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def inputs(lengths_q, lengths_k, num_heads, num_key_value_heads, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths_q), num_heads), (sum(lengths_k), num_key_value_heads)]
    return [
        (3 * torch.randn(*shape, 6, generator=generator)).to(dtype).requires_grad_()
        for shape in (shapes[0], shapes[1], shapes[1])
    ]


def run(tensors, lengths_q, lengths_k, **options):
    return attention(
        *tensors,
        cu_seqlens_q=boundaries(lengths_q),
        cu_seqlens_k=boundaries(lengths_k),
        max_seqlen_q=max(lengths_q),
        max_seqlen_k=max(lengths_k),
        **options,
    )


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_output_and_gradients(lengths, window, softcap, num_key_value_heads):
    tensors = inputs(*lengths, 4, num_key_value_heads)
    options = {"scale": 0.3, "softcap": softcap, "window": window}
    out = run(tensors, *lengths, **options)
    expected = dense_attention(*tensors, *lengths, **options)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((out * weight).sum(), tensors)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), tensors)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [{"softcap": None}, {"softcap": 3.0}, {"window": None}, {"window": 3}, {"window": 5}, {"scale": 0.2}],
)
def test_each_option_matters(wrong):
    lengths = LENGTHS["causal"]
    tensors = inputs(*lengths, 4, 2)
    options = {"scale": 0.3, "softcap": 2.0, "window": 4}
    expected = dense_attention(*tensors, *lengths, **options)
    assert (run(tensors, *lengths, **options | wrong) - expected).abs().max() > 0.1


def test_sequences_do_not_see_each_other():
    lengths = LENGTHS["causal"]
    tensors = inputs(*lengths, 4, 2)
    expected = dense_attention(*tensors, *lengths, 0.3, None, None)
    shifted = ([6, 1, 12], [6, 1, 12])
    assert (run(tensors, *shifted, scale=0.3) - expected).abs().max() > 0.1


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_long_sequence_with_a_short_window(softcap):
    """Blocks of keys in which nothing is visible must not turn into NaN."""
    tensors = inputs([1100], [1100], 2, 1)
    out = run(tensors, [1100], [1100], scale=0.3, softcap=softcap, window=4)
    end = run([x[-20:] for x in tensors], [20], [20], scale=0.3, softcap=softcap, window=4)
    torch.testing.assert_close(out[-16:], end[-16:])
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), tensors))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_half_precision_keeps_dtype_and_softmax_in_float32(softcap):
    lengths = LENGTHS["causal"]
    tensors = inputs(*lengths, 4, 2, torch.bfloat16)
    out = run(tensors, *lengths, scale=0.3, softcap=softcap)
    expected = dense_attention(*tensors, *lengths, 0.3, softcap, None)
    assert out.dtype == torch.bfloat16
    # One rounding of the scores (up to 2^-9 of about 16), one of the weights, one of the output.
    assert (out - expected).abs().max() < 0.15
