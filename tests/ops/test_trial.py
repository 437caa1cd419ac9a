"""What a trial on a small input believes, and what it does not."""

import pytest
import torch

from common.ops.trial import try_out


@pytest.mark.parametrize(("factor", "is_right"), [(1.02, True), (1.1, False), (0.9, False)])
def test_rounding_is_believed_and_another_result_is_not(factor, is_right):
    """Relative to the truth, which is the definition in float32, and with gradients where none are on."""
    seen = []

    def definition(x):
        seen.append(x.dtype)
        return 1e4 * x

    with torch.no_grad():
        found = try_out(lambda x: factor * 1e4 * x, definition, [torch.ones(9, dtype=torch.bfloat16)])
    assert (found is None) == is_right and seen == [torch.float32]
