"""Mathematical operations of the models, each with one interface and a plain PyTorch definition.

The definition runs on any device in any dtype and is the truth in tests. Every op takes `backend`: "auto"
(the fastest that is installed and fits) or a name. Asking for one that is not there is an error,
never a fallback.
"""

from common.ops import attention, gated_activation, rms_norm, rotary
from common.ops.backends import choose_backend

OPS = {
    "attention": attention.BACKENDS,
    "rms_norm": rms_norm.BACKENDS,
    "rotary": rotary.BACKENDS,
    "gated_activation": gated_activation.BACKENDS,
}


def check_backend(backend: str) -> None:
    """Fails at load, not in the first batch, when an op lacks `backend`.

    Raises:
        ValueError: Some op has no such backend.
    """
    for op, available in OPS.items():
        choose_backend(op, backend, available)
