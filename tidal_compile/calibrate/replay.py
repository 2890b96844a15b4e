"""Many decode steps in one pass: what a model answers under a policy, as it would token by token.

A block of tokens follows a prefilled context. At layer l, the query of its i-th token sees the context and the
block's tokens up to i, whose keys all come from that layer under the same policy: so one pass over the layers gives
what decoding one by one gives. Each query of a selection layer chooses its own tokens; leading tokens of a block may
be dense, as those of a prompt are. All blocks of a context share a pass, each blind to the others, unless a layer
forgets tokens (a sliding window).

Plain PyTorch over Hugging Face's attention interface, with the definitions of `kernels/reference.py`: a layer that
reuses tokens costs as much as a dense one here, which is what lets any policy be tried without compiling it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import reference
from ..policy import LayerRole
from ..run import rewind

NAME = "tidal_replay"


@dataclass(frozen=True)
class Block:
    """Tokens `[1, m]` to decode, the first `dense` of them as part of the prompt; `labels` are what should follow."""

    kind: str
    tokens: Tensor
    dense: int = 0
    labels: Tensor | None = None  # [m - dense]

    @property
    def steps(self) -> int:
        """Tokens that are decoded under the policy."""
        return self.tokens.shape[1] - self.dense


@dataclass(frozen=True)
class Context:
    """A prefilled static cache of `length` tokens with room for all blocks, each of which starts from there."""

    cache: Any
    length: int
    blocks: tuple[Block, ...]
    windows: dict[int, Any] = field(default_factory=dict)


@torch.no_grad()
def replay(
    model: nn.Module, context: Context, roles: Sequence[LayerRole],
    observe: Callable[[Sequence[Block], "Call"], None] | None = None,
) -> list[Tensor]:  # fmt: skip
    """Logits `[m - dense, vocab]` in float32 of each block's sparse steps; `observe(blocks, call)` sees every call."""
    logits: list[Tensor] = []
    for blocks in [[block] for block in context.blocks] if context.windows else [context.blocks]:
        rewind(context.cache, context.length, context.windows)
        logits += _one_pass(model, context, blocks, roles, observe)
    return logits


def _one_pass(
    model: nn.Module, context: Context, blocks: Sequence[Block], roles: Sequence[LayerRole],
    observe: Callable[[Sequence[Block], "Call"], None] | None,
) -> list[Tensor]:  # fmt: skip
    sizes = [block.tokens.shape[1] for block in blocks]
    place = torch.cat([torch.arange(size) for size in sizes]).to(model.device)  # in its block
    number = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(model.device)
    dense = place < torch.tensor([block.dense for block in blocks], device=model.device)[number]
    apart = (number[:, None] == number) & (place[:, None] >= place)  # which of the pass's tokens a query sees
    sets: dict[int, Tensor] = {}

    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **_):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        mask = attention_mask if len(blocks) == 1 else _sees(context.length, apart, key.shape[2])
        scores = _scores(query, key, mask, scale, softcap)
        call = Call(module.layer_idx, scores, value[0], s_aux, number, dense)
        role = roles[call.layer]
        if role.role == "select":
            sets[call.layer] = call.choose(role)
        if observe is not None:
            observe(blocks, call)
        out = call.attend(sets[role.source] if role.role == "reuse" else None)
        return out[None].to(query.dtype), None

    with _attention(model, attend):
        out = model(
            input_ids=torch.cat([block.tokens for block in blocks], 1), position_ids=(context.length + place)[None],
            past_key_values=context.cache, use_cache=True, logits_to_keep=(~dense).nonzero()[:, 0],
        )  # fmt: skip
    return list(out.logits[0].float().split([block.steps for block in blocks]))


def _sees(length: int, apart: Tensor, slots: int) -> Tensor:
    """Which slots of the cache each query sees, `[m, slots]`: the context, and its own block as far as it has come."""
    m = apart.shape[0]
    sees = apart.new_zeros(m, slots)
    sees[:, :length] = True
    sees[:, length : length + m] = apart
    return sees


@dataclass(frozen=True)
class Call:
    """One attention call: scores `[m, Hkv, g, n]`, -inf where a query may not look, and values `[Hkv, n, D]`.

    `number [m]` is the block of each query among those of the pass, and `dense [m]` whether it belongs to the prompt.
    """

    layer: int
    scores: Tensor
    values: Tensor
    sink: Tensor | None
    number: Tensor
    dense: Tensor

    def choose(self, role: LayerRole) -> Tensor:
        """The tokens that each query chooses as a selection of this role: bool `[m, G, n]`, all for the dense ones."""
        valid = self.scores[:, 0, 0] > -torch.inf
        width = reference.index_width(role.budget, role.ratio, valid.shape[1])
        wish = reference.importance(self.scores, role.share, self.sink)
        index = reference.choose_tokens(wish, valid, width, role.budget, role.ratio, role.sinks, role.recent).long()
        chosen = torch.zeros(*index.shape[:2], valid.shape[1] + 1, dtype=torch.bool, device=index.device)
        chosen.scatter_(2, torch.where(index < 0, valid.shape[1], index), True)  # what is unused goes into a spare slot
        chosen = chosen[..., :-1].clone()
        chosen[self.dense] = True
        return chosen

    def attend(self, chosen: Tensor | None) -> Tensor:
        """Attention to the chosen tokens `[m, G, n]` only, or to all: `[m, Hq, D]` in float32."""
        m, num_kv_heads, group, n = self.scores.shape
        scores = self.scores
        if chosen is not None:
            sets = chosen.view(m, num_kv_heads, -1, n) if chosen.shape[1] > 1 else chosen[:, None]
            scores = scores.masked_fill(~sets, -torch.inf)
        weights = reference.probabilities(scores, self.sink)
        out = weights.permute(1, 0, 2, 3).reshape(num_kv_heads, m * group, n) @ self.values.float()
        return out.view(num_kv_heads, m, group, -1).transpose(0, 1).reshape(m, num_kv_heads * group, -1)


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """q `[1, Hq, m, D]`, k `[1, Hkv, n, D]` -> scores `[m, Hkv, g, n]` in float32."""
    num_heads, m, head_dim = query.shape[1:]
    num_kv_heads, n = key.shape[1:3]
    q = query[0].float().reshape(num_kv_heads, -1, head_dim)  # [Hkv, g * m, D]
    scores = (q @ key[0].float().mT * scale).view(num_kv_heads, num_heads // num_kv_heads, m, n)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if mask is None:
        mask = torch.ones(m, n, dtype=torch.bool, device=query.device).tril(n - m)
    return scores.masked_fill(~mask[..., :n].reshape(m, n), -torch.inf).permute(2, 0, 1, 3)


@contextlib.contextmanager
def _attention(model: nn.Module, function: Callable) -> Iterator[None]:
    """The model with another attention function. Raises what transformers raises if the model takes none."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, function)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
