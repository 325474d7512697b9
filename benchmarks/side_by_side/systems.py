"""The systems of the table behind one interface: TRL's eager code and kernels, Liger's two losses, and fastgrpo.

A method that a system does not have raises NotImplementedError and shows as a dash. Triton kernels run on CPU tensors
in Triton's interpreter (TRITON_INTERPRET=1), which executes their real source.
"""

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor


class System:
    """Interface of a column; logits are [N, V] for `score` and [B, T, V] for `loss`."""

    title = ""
    environment: ClassVar[dict[str, str]] = {}
    extra_position = False  # takes [B, T + 1, V] logits
    # Logits reach it through a product with a head, so that -inf and NaN would spread by 0 * inf.
    one_row_only = False

    def score(
        self, logits: Tensor, ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Log-prob and entropy, differentiable."""
        raise NotImplementedError

    def loss(
        self,
        logits: Tensor,
        ids: Tensor,
        advantage: Tensor,
        mask: Tensor,
        old: Tensor | None = None,
        ref: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """GRPO loss, mean over sequences of token means. Options: temperature, beta, eps_low, delta, inplace."""
        raise NotImplementedError

    def advantage(self, reward: Tensor, group_size: int) -> Tensor:
        """Group-relative advantages."""
        raise NotImplementedError

    def faults(self, *args: Any) -> int | None:
        """Number of faulty tokens that the system reports for the arguments of `loss`; None if it does not count."""
        return None


class TRLEager(System):
    """TRL's torch code: log-probs from `trl.trainer.utils`, the loss by `GRPOTrainer._compute_loss` on a stub."""

    title = "TRL eager"

    def score(self, logits, ids, temperature=1.0):
        from trl.trainer.utils import selective_log_softmax_and_entropy

        return selective_log_softmax_and_entropy(logits, ids, temperature=temperature)

    def loss(self, logits, ids, advantage, mask, old=None, ref=None, **options):
        from trl.trainer.grpo_trainer import GRPOTrainer

        logprob, entropy = self.score(logits, ids, options.get("temperature", 1.0))
        inputs = {
            "prompt_ids": torch.zeros(len(logits), 1, dtype=torch.int64),
            "prompt_mask": torch.ones(len(logits), 1, dtype=torch.int64),
            "completion_ids": ids,
            "completion_mask": mask.long(),
            "advantages": advantage,
            "num_items_in_batch": mask.sum(),
        }
        inputs |= {} if old is None else {"old_per_token_logps": old}
        inputs |= {} if ref is None else {"ref_per_token_logps": ref}
        trainer = self._stub(logprob, entropy, options)
        return GRPOTrainer._compute_loss(trainer, None, inputs)

    @staticmethod
    def _stub(logprob, entropy, options):
        from trl import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer

        config = GRPOConfig(
            output_dir="unused", use_cpu=True, bf16=False, report_to=[], loss_type="grpo", delta=options.get("delta"),
            beta=options.get("beta", 0.0), epsilon=options.get("eps_low", 0.2), epsilon_high=0.2,
            temperature=options.get("temperature", 1.0), num_generations=2, per_device_train_batch_size=2,
        )  # fmt: skip
        return SimpleNamespace(
            args=config, loss_type="grpo", epsilon_low=config.epsilon, epsilon_high=config.epsilon_high,
            beta=config.beta, importance_sampling_level="token", off_policy_mask_threshold=None,
            top_entropy_quantile=1.0, max_completion_length=16, use_vllm=False,
            vllm_importance_sampling_correction=False, entropy_coef=0.0, use_adaptive_entropy=False,
            _entropy_bonus_enabled=False, aux_loss_enabled=False, current_gradient_accumulation_steps=1,
            accelerator=SimpleNamespace(num_processes=1, sync_gradients=True, gather=lambda x: x,
                                        gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x),
            model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
            get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
            get_gamma_weights=GRPOTrainer.get_gamma_weights,
            _get_per_token_logps_and_entropies=lambda *_, **__: (logprob, entropy, None),
        )  # fmt: skip

    def advantage(self, reward, group_size):
        from trl.trainer.utils import nanstd

        grouped = reward.view(-1, group_size)
        mean = torch.nanmean(grouped, dim=1).repeat_interleave(group_size)
        std = torch.zeros_like(reward)
        if group_size > 1:
            std = nanstd(grouped, dim=1).repeat_interleave(group_size)
        return torch.nan_to_num((reward - mean) / (std + 1e-4), nan=0.0)


class TRLTriton(System):
    """`trl.kernels.logprob_entropy`."""

    title = "TRL Triton"
    environment: ClassVar[dict[str, str]] = {"TRITON_INTERPRET": "1"}

    def score(self, logits, ids, temperature=1.0):
        from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

        return selective_log_softmax_and_entropy(logits, ids, temperature)


class TRLChunked(System):
    """`trl.kernels.chunked_logprob`, torch tiles on a CPU; each row of logits is a head applied to the number 1."""

    title = "TRL chunked"
    one_row_only = True

    def score(self, logits, ids, temperature=1.0):
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        hidden = torch.ones(1, 1, dtype=logits.dtype)
        out = ChunkedLogProbFunction.apply(
            hidden,
            logits.reshape(-1, 1),
            None,
            ids.reshape(1),
            temperature,
            4096,
            None,
            1.0,
            ("entropy",),
        )
        return out[0], out[1]


class LigerChunked(System):
    """`LigerFusedLinearGRPOLoss`; several rows of logits are a head applied to unit vectors."""

    title = "Liger chunked"
    one_row_only = True

    def loss(self, logits, ids, advantage, mask, old=None, ref=None, **options):
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        batch, length, vocabulary = logits.shape
        rows = batch * length
        hidden = torch.eye(rows, dtype=logits.dtype).view(batch, length, rows)
        beta = options.get("beta", 0.0)
        loss = LigerFusedLinearGRPOLoss(
            beta=beta, compiled=False, use_ref_model=bool(beta), chunk_size=batch, loss_type="grpo",
            epsilon_low=options.get("eps_low", 0.2), epsilon_high=0.2, delta=options.get("delta"),
            temperature=options.get("temperature", 1.0),
        )  # fmt: skip
        out = loss(
            hidden, logits.reshape(rows, vocabulary).t(), ids, mask.long(), advantage,
            ref_per_token_logps=ref, old_per_token_logps=old,
        )  # fmt: skip
        return out[0]


class LigerTriton(System):
    """`triton_grpo_loss`, which takes [B, T + 1, V] logits."""

    title = "Liger Triton"
    extra_position = True
    environment: ClassVar[dict[str, str]] = {"TRITON_INTERPRET": "1"}

    def loss(self, logits, ids, advantage, mask, old=None, ref=None, **options):
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        longer = logits
        if logits.shape[1] == ids.shape[1]:
            batch, _, vocabulary = logits.shape
            longer = torch.cat([logits, logits.new_zeros(batch, 1, vocabulary)], 1)
        loss, _ = triton_grpo_loss(
            longer, old, ref, ids, advantage, mask.long(), temperature=options.get("temperature", 1.0),
            beta=options.get("beta", 0.0), eps_low=options.get("eps_low", 0.2), eps_high=0.2, loss_type="grpo",
            delta=options.get("delta"), inplace=bool(options.get("inplace")), reduce=True,
        )  # fmt: skip
        return loss


class FastGRPO(System):
    """This package, on whatever kernel serves CPU tensors."""

    title = "fastgrpo"

    def score(self, logits, ids, temperature=1.0):
        from fastgrpo import token_logprob

        return token_logprob(logits, ids, temperature=temperature, with_entropy=True)

    def _run(self, logits, ids, advantage, mask, old=None, ref=None, **options):
        from fastgrpo import Objective, grpo_loss

        names = {"eps_low": "epsilon", "delta": "delta", "beta": "beta"}
        objective = Objective.grpo(
            **{names[k]: v for k, v in options.items() if k in names and v is not None}
        )
        return grpo_loss(
            logits, ids, advantage, mask, old_logprob=old, ref_logprob=ref, objective=objective,
            temperature=options.get("temperature", 1.0), overwrite_logits=bool(options.get("inplace")),
        )  # fmt: skip

    def loss(self, *args, **options):
        return self._run(*args, **options).loss

    def advantage(self, reward, group_size):
        from fastgrpo import group_advantage

        return group_advantage(reward, group_size=group_size).advantage

    def faults(self, *args):
        with torch.no_grad():
            return int(self._run(*args).metrics.sum("fault"))


class FastGRPOTriton(FastGRPO):
    """The same through the Triton kernels, in the interpreter."""

    title = "fastgrpo Triton"
    environment: ClassVar[dict[str, str]] = {"TRITON_INTERPRET": "1", "FASTGRPO_BACKEND": "triton"}


SYSTEMS: dict[str, Callable[[], System]] = {
    "trl-eager": TRLEager,
    "trl-triton": TRLTriton,
    "trl-chunked": TRLChunked,
    "liger-chunked": LigerChunked,
    "liger-triton": LigerTriton,
    "fastgrpo": FastGRPO,
    "fastgrpo-triton": FastGRPOTriton,
}
