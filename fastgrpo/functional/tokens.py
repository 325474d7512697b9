"""Helpers shared by token-level rewards and advantages: layout, the next token, the last live token."""

import torch
from torch import Tensor

from fastgrpo.functional.checks import as_mask, require_device, require_float, require_shape
from fastgrpo.functional.segment_scan import Sequences, segment_scan, sequences


class Tokens:
    """The tokens of a padded [B, T] batch, or of a packed [N] one with the ends of its sequences."""

    def __init__(self, like: Tensor, mask: Tensor, cu_seqlens: Tensor | None, name: str) -> None:
        """Check mask and sequences against the tensor `like`, called `name`."""
        self.layout: Sequences = sequences(name, like, cu_seqlens)
        self.cu_seqlens = cu_seqlens
        self.live = as_mask(mask, like.shape, like, name)
        self.like, self.name = like, name

    def check(self, name: str, value: object) -> Tensor:
        """Return a float tensor with one value per token."""
        tensor = require_float(name, value)
        require_shape(name, tensor, self.like.shape, f"one value per token of {self.name}")
        require_device(name, tensor, self.like, self.name)
        return tensor

    def check_row(self, name: str, value: object) -> Tensor:
        """Return a float tensor with one value per sequence."""
        tensor = require_float(name, value)
        require_shape(name, tensor, (self.layout.cu_seqlens.numel() - 1,), "one value per sequence")
        require_device(name, tensor, self.like, self.name)
        return tensor

    def scan(self, x: Tensor, decay: float | Tensor = 1.0) -> Tensor:
        """Run y_t = x_t + decay_t * y_{t+1} within each sequence."""
        return segment_scan(x, decay, cu_seqlens=self.cu_seqlens)

    def whole(self, x: Tensor) -> Tensor:
        """Give every token the sum over its sequence, the same bits to each."""
        first = self._scan_forward(torch.ones_like(x, requires_grad=False)) == 1
        return self._scan_forward(torch.where(first, self.scan(x), 0.0))

    def spread(self, per_row: Tensor) -> Tensor:
        """Give every token the value of its sequence."""
        if self.cu_seqlens is None:
            return per_row[:, None].expand(self.like.shape)
        if per_row.numel() == 0:
            return torch.zeros_like(self.like)
        return per_row[self._sequence().clamp(max=per_row.numel() - 1)]

    def after(self, x: Tensor) -> Tensor:
        """Value of the next token of the same sequence, 0 at its end."""
        flat = x.reshape(-1)
        moved = torch.cat([flat[1:], flat.new_zeros(min(1, flat.numel()))])
        if self.cu_seqlens is None:
            moved = moved.view(x.shape)
            return torch.cat([moved[:, :-1], torch.zeros_like(moved[:, -1:])], dim=1)
        sequence = self._sequence()
        end = sequence != torch.cat([sequence[1:], sequence.new_full((min(1, flat.numel()),), -1)])
        return torch.where(end, 0, moved)

    def is_last(self) -> Tensor:
        """Mark the last live token of each sequence."""
        remaining = self.scan(self.live.to(torch.float32))
        return self.live & (self.after(remaining) == 0)

    def _scan_forward(self, x: Tensor) -> Tensor:
        return segment_scan(x, 1.0, cu_seqlens=self.cu_seqlens, reverse=False)

    def _sequence(self) -> Tensor:
        position = torch.arange(self.like.numel(), device=self.like.device)
        return torch.searchsorted(self.layout.cu_seqlens[1:].long(), position, right=True)
