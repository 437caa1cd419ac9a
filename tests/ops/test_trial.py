"""What a trial on a small input believes, and what it does not."""

import pytest
import torch

from common.ops.trial import try_out


@pytest.mark.parametrize(
    ("compute", "is_right"),
    [
        (lambda x: 1.02e4 * x, True),
        (lambda x: 1.1e4 * x, False),
        (lambda x: 0.9e4 * x, False),
        (lambda x: 1e4 * x.flip(0), False),  # of ones: seen by the gradient alone
    ],
)
def test_rounding_is_believed_and_another_result_is_not(compute, is_right):
    """Relative to the truth, which is the definition in float32, and with gradients where none are on."""
    seen = []

    def definition(x):
        seen.append(x.dtype)
        return 1e4 * x

    with torch.no_grad():
        found = try_out(compute, definition, [torch.ones(9, dtype=torch.bfloat16)])
    assert (found is None) == is_right and seen == [torch.float32]
