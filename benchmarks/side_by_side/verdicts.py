"""From what a system returned to one word of the table."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

OK, NAN_, WRONG = "ok", "NaN", "WRONG"
REFUSED, ACCEPTED, FLAGGED, ABSENT = "refused", "accepted", "flagged", "-"


def compare(actual: Tensor | None, expected: Tensor, atol: float) -> str:
    """ok, NaN where the truth is finite, or WRONG with the size of the error."""
    if actual is None:
        return ABSENT
    actual, expected = actual.detach().double(), expected.double()
    if actual.shape != expected.shape:
        return f"{WRONG} (shape)"
    if not bool(actual[expected.isfinite()].isfinite().all()):
        return NAN_
    same = (actual == expected) | ((actual - expected).abs() <= atol * (1 + expected.abs()))
    if bool(same.all()):
        return OK
    error = (actual - expected).abs()
    worst = float(error[error.isfinite()].max()) if bool(error.isfinite().any()) else math.inf
    return f"{WRONG} ({worst:.2g})"


def worst_of(*verdicts: str) -> str:
    """The verdict that says most against the system."""
    order = (WRONG, NAN_, OK, ABSENT)
    return min(
        verdicts, key=lambda v: next(i for i, word in enumerate(order) if v.startswith(word))
    )


def loss_and_gradient(
    loss: Tensor, grad: Tensor | None, want: tuple[Tensor, Tensor], atol: float
) -> str:
    """Compare both; a finite loss with a NaN gradient is the worst case, since no guard on the loss sees it."""
    if grad is None:
        return f"{WRONG} (no gradient)"
    if bool(loss.isfinite().all()) and not bool(grad.isfinite().all()):
        return f"finite loss {float(loss.sum()):.2g}, NaN gradient"
    return worst_of(compare(loss, want[0], atol), compare(grad, want[1], atol))


def refusal(call: Callable[[], object], *names: str) -> str:
    """`refused` by name, `ERR` if something else stops the call, `accepted` otherwise."""
    try:
        call()
    except NotImplementedError:
        raise
    except (ValueError, TypeError) as error:
        return (
            REFUSED
            if any(name in str(error) for name in names)
            else f"ERR ({type(error).__name__})"
        )
    except Exception as error:
        return f"ERR ({type(error).__name__})"
    return ACCEPTED


def confined(
    loss: Tensor, grad: Tensor | None, faulty: Tensor, clean: Tensor, faults: int | None
) -> str:
    """A fault of the data in rows `faulty`: visible, counted, and no other row's gradient touched.

    `clean` is the true gradient without the fault.
    """
    if grad is None:
        return f"{WRONG} (no gradient)"
    visible = not bool(loss.isfinite())
    if not visible and not bool(grad.isfinite().all()):
        return f"finite loss {float(loss):.2g}, NaN gradient"
    if not visible:
        return WRONG
    others = compare(grad[~faulty], clean[~faulty], 1e-5)
    if others != OK:
        return f"{others}, spreads to other rows"
    if faults is None:
        return "NaN in its row, not counted"
    return FLAGGED if faults == int(faulty.sum()) else f"{WRONG} ({faults} counted)"


def gradient(loss: Tensor, logits: Tensor) -> Tensor | None:
    """Gradient of the logits, None if there is no graph."""
    if not loss.requires_grad:
        return None
    return torch.autograd.grad(loss.sum(), logits, allow_unused=True)[0]
