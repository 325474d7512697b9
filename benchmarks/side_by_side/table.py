"""The rows of the table, in order, and which verdicts are right for each."""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.side_by_side import rows_loss as loss
from benchmarks.side_by_side import rows_score as score
from benchmarks.side_by_side.systems import System
from benchmarks.side_by_side.verdicts import ABSENT, FLAGGED, OK, REFUSED

Check = Callable[[System], str]


class Row(NamedTuple):
    """A line of the table; several checks are shown with a slash between them."""

    title: str
    checks: tuple[Check, ...]
    right: tuple[str, ...]  # for any system
    promised: tuple[str, ...] = ()  # of fastgrpo, where that is more


_EITHER = (OK, "ERR")  # right, or an error: an autograd question that need not be supported
_VISIBLE = (FLAGGED, "NaN in its row", "ERR")
_STOPPED = (REFUSED, "ERR")
LOGITS = (
    Row("N1 top-k mask: log-prob, gradient", (score.top_k,), (OK,)),
    Row("N1 top-k mask: entropy", (score.top_k_entropy,), (OK,)),
    Row("N2 first 4096 columns -inf", (score.leading_block_masked,), (OK,)),
    Row("N3 a row all -inf", (score.all_masked_row,), _VISIBLE, (FLAGGED,)),
    Row("N5 one NaN logit in one row", (score.one_nan,), _VISIBLE, (FLAGGED,)),
    Row("N6 logits 1e37 at T = 0.01", (score.huge,), (OK,)),
    Row("N12 id -100 / V on a live token", (score.ignore_id, score.id_v), _VISIBLE, (FLAGGED,)),
    Row(
        "N20 T = 0 / T = -1",
        (score.temperature_zero, score.temperature_negative),
        _STOPPED,
        (REFUSED,),
    ),
    Row("N7 float64 logits, error <= 1e-12", (score.float64,), (OK,)),
    Row("N9 no sequence (B = 0)", (score.no_sequence,), (OK,)),
    Row("N9 no position (T = 0)", (score.no_position,), (OK,)),
    Row("N14 transposed logits", (score.transposed,), (OK,)),
    Row("N13 rows more than 2^31 apart", (score.far_rows,), (OK,)),
    Row("N31 gradient penalty (second derivative)", (score.gradient_penalty,), _EITHER),
    Row("N31 torch.func.grad", (score.functional_grad,), _EITHER),
)
LOSSES = (
    Row("N16 log-ratio +100, A < 0", (loss.ratio_negative,), (OK,)),
    Row("N16 log-ratio +100, A = 0", (loss.ratio_idle,), (OK,)),
    Row("N17 reference +100 nats away", (loss.far_reference,), (OK,)),
    Row(
        "N11 masked NaN / masked old = -inf", (loss.masked_garbage, loss.masked_old_infinite), (OK,)
    ),
    Row("N10 whole batch masked", (loss.all_masked,), (OK,)),
    Row("N10 one sequence masked: mean over all", (loss.one_masked,), (OK,)),
    Row(
        "N28 advantage (B, 1) / (B, T)",
        (loss.advantage_column, loss.advantage_token),
        (OK, REFUSED),
    ),
    Row("N28 advantage (B - 1,)", (loss.advantage_short,), _STOPPED, (REFUSED,)),
    Row("N28 old log-prob (B, 1) / (T,)", (loss.old_column, loss.old_row), _STOPPED, (REFUSED,)),
    Row(
        "N20 epsilon -0.5 / epsilon 1.5 / beta -1",
        (loss.epsilon_negative, loss.epsilon_large, loss.beta_negative),
        _STOPPED,
        (REFUSED,),
    ),
    Row("N19 beta > 0 without a reference", (loss.reference_missing,), _STOPPED, (REFUSED,)),
    Row("N20 delta = 0", (loss.delta_zero,), _STOPPED, (REFUSED,)),
    Row(
        "N30 in place: second backward / tanh producer / shared logits",
        (loss.second_backward, loss.saved_output, loss.shared_logits),
        _EITHER,
    ),
)
ADVANTAGES = (
    Row("N24 7 rewards of 1/3", (loss.equal_thirds,), (OK,)),
    Row("N24 3000 groups of equal rewards", (loss.equal_random,), (OK,)),
    Row("N26 one NaN reward (not scored)", (loss.nan_reward,), (OK,)),
    Row("N26 one infinite reward", (loss.infinite_reward,), _STOPPED, (REFUSED,)),
    Row("N25 rewards 0 and 1e30", (loss.huge_reward,), (OK,)),
    Row("N24 group of one", (loss.single,), (OK,)),
)
ROWS = (*LOGITS, *LOSSES, *ADVANTAGES)


def is_right(row: Row, verdict: str, promised: bool = False) -> bool:
    """Whether a verdict is one of the right ones (or the system does not have the function)."""
    words = row.promised if promised and row.promised else row.right
    return verdict == ABSENT or any(verdict.startswith(word) for word in words)
