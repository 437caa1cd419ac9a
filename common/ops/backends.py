"""How an op picks one of its implementations."""

from collections.abc import Callable, Mapping


def choose_backend(op: str, backend: str, available: Mapping[str, Callable]) -> Callable:
    """The implementation of `op` that `backend` names.

    Args:
        op: Name of the op, for the message.
        backend: "auto" or a key of `available`.
        available: Backend name -> function, fastest first.

    Raises:
        ValueError: No such backend.
    """
    if backend == "auto":
        return next(iter(available.values()))
    if backend not in available:
        raise ValueError(
            f"{op} has no backend {backend!r} here; available: auto, {', '.join(available)}. "
            "Choose one of these, or install the package that brings the other."
        )
    return available[backend]
