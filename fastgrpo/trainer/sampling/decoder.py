"""A decoder for Llama, Qwen2 and Qwen3 that does only what sampling needs: fused weights, a preallocated KV cache.

`transformers.generate` spends most of a tiny model's step in Python. This forward does the same arithmetic on the
same weights in a quarter of the calls; a test holds it equal to the Hugging Face forward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(slots=True)
class KVCache:
    """Keys and values of every layer; `length` columns are filled, columns where `bias` is -inf are padding."""

    key: list[Tensor]  # per layer [B, heads, T, head size]
    value: list[Tensor]
    bias: Tensor  # [B, 1, 1, T]: added to the attention scores
    position: Tensor  # [B]: position of the next token
    length: int

    def select(self, rows: Tensor) -> "KVCache":
        """The cache of some rows only (of all columns that may still be written)."""

        def take(x: Tensor) -> Tensor:
            kept = x.new_empty(len(rows), *x.shape[1:])
            torch.index_select(x[:, :, : self.length], 0, rows, out=kept[:, :, : self.length])
            return kept

        return KVCache(
            [take(k) for k in self.key],
            [take(v) for v in self.value],
            self.bias[rows],
            self.position[rows],
            self.length,
        )


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one block, ready for `F.linear`."""

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None  # Qwen2
    qk_norm: Tensor | None  # Qwen3: [heads + kv heads, 1, head size]
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angles depend on nothing but the position."""


def can_decode(model: nn.Module) -> bool:
    """Whether `Decoder` computes exactly what this model computes."""
    config: Any = getattr(model, "config", None)
    if type(model).__name__ not in FAMILIES or config.hidden_act != "silu":
        return False
    biased = any(
        name.endswith(".bias") and name.split(".")[-2] not in ("q_proj", "k_proj", "v_proj")
        for name, _ in model.named_parameters()
    )
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return not biased and set(kinds) == {"full_attention"} and rope in STATIC_ROPE


class Decoder:
    """Prefill and single steps of a model; `refresh` takes over new weights."""

    def __init__(self, model: nn.Module) -> None:
        if not can_decode(model):
            raise ValueError(
                f"model must be a {', '.join(FAMILIES)} with full attention and without biases behind the attention, "
                f"got {type(model).__name__} {getattr(model, 'config', '')}"
            )
        self.model: Any = model
        config: Any = model.config
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps: float = config.rms_norm_eps
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the model's present weights, those that are used together next to each other."""
        self.layers = []
        for block in self.model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            parts = (attention.q_proj, attention.k_proj, attention.v_proj)
            norm = None
            if hasattr(attention, "q_norm"):
                heads = (self.heads, attention.q_norm), (self.kv_heads, attention.k_norm)
                norm = torch.cat([n.weight.expand(count, 1, -1) for count, n in heads])
            biased = parts[0].bias is not None
            self.layers.append(
                Layer(
                    attention_norm=block.input_layernorm.weight.clone(),
                    qkv=torch.cat([part.weight for part in parts]),
                    qkv_bias=torch.cat([part.bias for part in parts]) if biased else None,
                    qk_norm=norm,
                    output=attention.o_proj.weight.clone(),
                    mlp_norm=block.post_attention_layernorm.weight.clone(),
                    gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                    down=mlp.down_proj.weight.clone(),
                )
            )
        self.embedding = self.model.model.embed_tokens.weight.detach().clone()
        self.norm = self.model.model.norm.weight.detach().clone()
        self.head = self.model.lm_head.weight.detach().clone()

    def _rope(self, width: int) -> tuple[Tensor, Tensor]:  # [width, head size] each
        positions = torch.arange(width, device=self.embedding.device)[None]
        cos, sin = self.model.model.rotary_emb(self.embedding, positions)
        return cos[0], sin[0]

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)

    def _qkv(self, x: Tensor, layer: Layer, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """[B, S, hidden] -> rotated q [B, heads, S, d], rotated k and v [B, kv heads, S, d]."""
        b, s, _ = x.shape
        fused = F.linear(self._rms(x, layer.attention_norm), layer.qkv, layer.qkv_bias)
        fused = fused.view(b, s, -1, self.head_size).transpose(1, 2)
        qk, v = fused[:, : self.heads + self.kv_heads], fused[:, self.heads + self.kv_heads :]
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, (self.head_size,), None, self.eps) * layer.qk_norm
        low, high = qk.chunk(2, -1)
        qk = qk * cos + torch.cat([-high, low], -1) * sin
        return qk[:, : self.heads], qk[:, self.heads :], v

    def _block(self, x: Tensor, layer: Layer, attended: Tensor) -> Tensor:
        b, _, s, _ = attended.shape
        x = x + F.linear(attended.transpose(1, 2).reshape(b, s, -1), layer.output)
        gate, up = F.linear(self._rms(x, layer.mlp_norm), layer.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, layer.down)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,  # [P, S], padded on the left
        padding: Tensor,  # [P]: number of padding columns of each row
        room: int,  # columns kept free for new tokens
        repeats: int,  # the cache and the logits are returned for every prompt this many times
    ) -> tuple[Tensor, KVCache]:
        """Runs the prompts once; returns the logits of the next token [P * repeats, V] and the cache."""
        b, s = input_ids.shape
        column = torch.arange(s, device=input_ids.device)
        position = (column - padding[:, None]).clamp_min_(0)
        # A padding column sees only itself: its output is never used, but it must not be NaN.
        visible = (column[None, :] <= column[:, None]) & (column >= padding[:, None])[:, None, :]
        visible |= torch.eye(s, dtype=torch.bool, device=input_ids.device)
        self.cos, self.sin = self._rope(s + room)
        cos, sin = self.cos[position][:, None], self.sin[position][:, None]
        x = self.embedding[input_ids]
        keys, values = list[Tensor](), list[Tensor]()
        for layer in self.layers:
            q, k, v = self._qkv(x, layer, cos, sin)
            attended = F.scaled_dot_product_attention(
                q, k, v, visible[:, None], enable_gqa=self.heads != self.kv_heads
            )
            x = self._block(x, layer, attended)
            for filled, store in ((k, keys), (v, values)):
                columns = k.new_empty(b * repeats, self.kv_heads, s + room, self.head_size)
                columns[:, :, :s] = filled.repeat_interleave(repeats, 0)
                store.append(columns)
        logits = F.linear(self._rms(x[:, -1], self.norm), self.head).float()
        bias = x.new_zeros(b, 1, 1, s + room)
        bias[:, 0, 0, :s].masked_fill_(column < padding[:, None], -torch.inf)
        cache = KVCache(
            keys,
            values,
            bias.repeat_interleave(repeats, 0),
            (s - padding).repeat_interleave(repeats),
            s,
        )
        return logits.repeat_interleave(repeats, 0), cache

    @torch.no_grad()
    def step(self, token_ids: Tensor, cache: KVCache) -> Tensor:  # [B] -> [B, V]
        """Appends one token to every row of the cache and returns the logits of the next."""
        t = cache.length

        def store(columns: Tensor, new: Tensor) -> Tensor:
            columns[:, :, t] = new[:, :, 0]
            return columns[:, :, : t + 1]

        logits = self.one_token(token_ids, cache, cache.position, cache.bias[..., : t + 1], store)
        cache.length = t + 1
        cache.position = cache.position + 1
        return logits

    def one_token(
        self,
        token_ids: Tensor,  # [B]
        cache: KVCache,
        position: Tensor,  # [B]
        bias: Tensor,  # [B, 1, 1, columns that `store` returns]
        store: Callable[
            [Tensor, Tensor], Tensor
        ],  # puts [B, heads, 1, d] into keys or values, returns what is seen
    ) -> Tensor:  # [B, V]
        """The forward of one token per row."""
        cos, sin = self.cos[position][:, None, None], self.sin[position][:, None, None]
        x = self.embedding[token_ids][:, None]
        for i, layer in enumerate(self.layers):
            q, k, v = self._qkv(x, layer, cos, sin)
            attended = F.scaled_dot_product_attention(
                q,
                store(cache.key[i], k),
                store(cache.value[i], v),
                bias,
                enable_gqa=self.heads != self.kv_heads,
            )
            x = self._block(x, layer, attended)
        return F.linear(self._rms(x[:, 0], self.norm), self.head).float()
