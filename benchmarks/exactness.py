"""Is our step exact? Gradients against dense autograd, active features against a float32 encoder."""

from __future__ import annotations

from dataclasses import replace

from ours_sae import PlainAutograd, build
from peers_sae import Spec
from torch import Tensor

__all__ = ["exactness", "relative_error", "same_active"]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; dimensionless.

    Example:
        >>> relative_error(torch.tensor([3.0, 4.4]), torch.tensor([3.0, 4.0]))  # doctest: +ELLIPSIS
        0.08...
    """
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def same_active(actual: Tensor, expected: Tensor) -> float:
    """Entries active in both over entries active in either; entries inactive in both do not count.

    Example:
        >>> same_active(torch.tensor([True, True, False]), torch.tensor([True, False, False]))
        0.5
    """
    return float((actual & expected).sum() / (actual | expected).sum())


def exactness(spec: Spec, x: Tensor) -> dict[str, float]:
    """Compare on one batch at the start weights.

    Args:
        spec: The task; its options are replaced.
        x: Float32 `[batch, d_in]`.

    Returns:
        The largest relative error over the four parameters' gradients, in float32 and with a bfloat16 encoder, against
        dense autograd in float32; and the share of active entries that the bfloat16 encoder leaves as they are.
    """

    def fresh(**options: str) -> Spec:
        return replace(spec, start={name: w.clone() for name, w in spec.start.items()}, options=options)

    dense = PlainAutograd(fresh().start, k=spec.k, lr=spec.lr, l1=spec.l1)
    expected, expected_active = dense.gradients(x), dense.active(x)
    del dense
    error = {}
    active = {}
    for dtype in ("float32", "bfloat16"):
        ours = build(fresh(encoder_dtype=dtype))
        gradients = ours.gradients(x)
        error[dtype] = max(relative_error(gradients[name], expected[name]) for name in expected)
        active[dtype] = ours.active(x).clone()
        del ours
    return {
        "gradient_error": error["float32"],
        "gradient_error_bf16": error["bfloat16"],
        "same_active": same_active(active["float32"], expected_active),
        "same_active_bf16": same_active(active["bfloat16"], active["float32"]),
    }
