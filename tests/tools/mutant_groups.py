"""What a mutation campaign changes, and which tests have to notice."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Which files are changed, and what must notice."""

    files: tuple[str, ...]
    tests: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    build: bool = False


_KERNELS = ("row", "row_gradient", "token_logprob", "policy_terms", "policy_loss", "policy_metrics", "grpo_loss",
            "kl_terms", "gates", "numerics", "kl_estimate", "scale_gradient")  # fmt: skip
_PARTS = ("logits", "losses", "limits", "batch", "linear")
_CATALOGUE = tuple(f"tests/ops/test_catalogue_{part}.py" for part in _PARTS)
GROUPS = {
    "reference": Group(
        ("fastgrpo/reference/token_logprob.py", "fastgrpo/reference/policy_loss.py", "fastgrpo/reference/gates.py",
         "fastgrpo/reference/kl_estimate.py", "fastgrpo/reference/grpo_loss.py", "fastgrpo/reference/log_ratio.py"),
        ("tests/ops/test_reference.py", "tests/test_losses.py", *_CATALOGUE, "tests/test_rollout_correction.py",
         "tests/ops/test_gradcheck.py", "tests/ops/test_determinism.py", "tests/test_metrics.py"),
        (("FASTGRPO_BACKEND", "reference"),),
    ),
    # Not launch.py: its numbers are tuning, no result depends on them.
    "triton": Group(tuple(f"fastgrpo/kernels/{name}.py" for name in _KERNELS), ("tests/interpreter",)),
    "cpu": Group(
        ("csrc/cpu/*.inc", "csrc/cpu/policy_*.cpp", "csrc/cpu/grpo_loss.cpp", "csrc/cpu/kl_estimate.cpp",
         "csrc/cpu/token_logprob.cpp", "csrc/cpu/token_rows.h", "csrc/cpu/tensors.h"),
        (*_CATALOGUE, "tests/cpu", "tests/ops/test_memory_fence.py", "tests/ops/test_determinism.py",
         "tests/ops/test_gradcheck.py", "tests/ops/test_fuzz.py"),
        build=True,
    ),
    "host": Group(
        ("fastgrpo/batch.py", "fastgrpo/reduction.py", "fastgrpo/losses.py", "fastgrpo/metrics.py",
         "fastgrpo/rollout_correction.py", "fastgrpo/functional/checks.py", "fastgrpo/functional/token_logprob.py",
         "fastgrpo/functional/policy_loss.py", "fastgrpo/functional/grpo_loss.py",
         "fastgrpo/functional/kl_estimate.py"),
        ("tests/test_losses.py", *_CATALOGUE, "tests/ops/test_errors.py", "tests/ops/test_errors_elsewhere.py",
         "tests/ops/test_autograd.py", "tests/ops/test_autograd_modes.py", "tests/test_metrics.py",
         "tests/test_rollout_correction.py", "tests/ops/test_determinism.py", "tests/ops/test_large_offsets.py"),
    ),
    "linear": Group(
        ("fastgrpo/functional/linear/*.py", "fastgrpo/functional/linear_*.py", "fastgrpo/linear_losses.py",
         "fastgrpo/row_plan.py"),
        ("tests/ops/test_catalogue_linear.py", "tests/test_linear_grpo_loss.py", "tests/test_linear_token_logprob.py",
         "tests/test_linear_errors.py", "tests/test_linear_products.py", "tests/test_linear_precision.py",
         "tests/test_linear_room.py", "tests/test_row_plan.py", "tests/test_linear_trl.py",
         "tests/test_linear_compile.py", "tests/test_linear_vocabulary_parallel.py"),
    ),
}  # fmt: skip
