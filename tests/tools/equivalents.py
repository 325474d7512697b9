"""Mutants that are the same program, or the same results more slowly: nothing can notice them. Each with its reason."""

# (file, line of source, before, after) -> why.
EQUIVALENT = {
    ("fastgrpo/reference/policy_loss.py", "d = d + torch.where(tokens.live, log_weight, 0.0)", "0.0", "1.0"):
        "masked tokens are selected away from every sum and output that follows",
    ("fastgrpo/reduction.py", "return per_sequence[index.clamp(max=max(per_sequence.numel() - 1, 0))]", "0", "1"):
        "without a sequence there is no token either, and nothing is indexed",
    ("fastgrpo/reduction.py", "return local.clamp(min=1)", "1", "0"):
        "a count of live tokens is 0 only where no token has a weight",
    ("fastgrpo/functional/linear/loss.py", 'if active.device.type == "cpu":', "==", "!="):
        "whether inactive rows are left out of the product or multiplied as zeros",
    ("fastgrpo/functional/linear_grpo_loss.py", "wide = gradient.dtype == torch.float64", "==", "!="):
        "the op takes a scale of either type, and autograd hands over one of the loss's type, which is the gradient's",
    ("fastgrpo/functional/linear/weight_sum.py",
     "for (start, stop), slab in zip(self.bounds(), self.slabs, strict=True):", "True", "False"):
        "bounds() has one entry per slab",
    ("fastgrpo/kernels/policy_loss.py", "pools = spec[SPEC_HEAD + 2 :: SPEC_GATE][: spec[SPEC_HEAD - 1]]", "+", "-"):
        "chooses the launch shape of unpooled objectives only; the sequence kernel computes them too",
    ("fastgrpo/kernels/row.py", "residue = tl.where(total == total, 0.0, 0.0).to(tl.float64)", "==", "!="):
        "0 either way: only the shape of `total` is wanted",
    ("csrc/cpu/policy_sequence.inc", "for (int64_t i = begin; i < end; i += kWide) {", "<", "<="):
        "one more tile, of no token",
    ("csrc/cpu/row_stats.inc", "lane_is_live[lane] = lane < count ? S(1) : S(0);", "1", "2"):
        "only compared with 0",
    ("csrc/cpu/token_rows.h", "if (p != 0) {", "0", "1"):
        "at p = 1 the term that is left out is 0, at p = 0 the one that is put in is 0 times a finite number",
}  # fmt: skip
