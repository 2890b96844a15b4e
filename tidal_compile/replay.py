"""Many decode steps in one pass: what a model answers under a policy, as it would token by token.

A block of tokens follows a prefilled context. At layer l, the query of its i-th token sees the context and the
block's tokens up to i, whose keys all come from that layer under the same policy: so one pass over the layers gives
what decoding one by one gives. Each query of a selection layer chooses its own tokens. Leading tokens of a block may
be dense, as those of a prompt are.

All blocks of a context share a pass, each blind to the others, and what a prompt leaves in the cache is computed once;
unless a layer forgets tokens (a sliding window), where every block is a pass of its own. For methods that go by slots
of the cache (pages), contexts must have whole pages, and blocks are filled up with tokens that no other one sees.

Plain PyTorch over Hugging Face's attention interface: roles do what `passes/roles.py` says, over the definitions of
`kernels/reference.py` with many query tokens, so that any policy can be tried without compiling it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .errors import UnsupportedModelError
from .kernels import reference
from .kernels.call import Call
from .kernels.methods.pages import SIZES
from .kernels.ops import DEFINITIONS
from .models import continues, with_cache
from .passes.compat import attention_implementation
from .passes.match import AttentionSite, Unmatched
from .passes.roles import LayerRole, Sets, follow
from .run import rewind, windows

NAME = "tidal_function"  # of an attention function, for transformers
PAGE = SIZES[-1]  # slots: the largest page, of which the smaller ones are parts


@contextlib.contextmanager
def attention_function(model: PreTrainedModel, function: Callable) -> Iterator[None]:
    """`function` in place of the model's attention, through transformers' attention interface; masks are bool.

    Raises `UnsupportedModelError` in a forward pass that never called it: some models keep attention of their own.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    called = False

    def attend(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        called = True
        return function(*args, **kwargs)

    def check(*_: Any) -> None:
        if not called:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not take its attention from transformers' attention interface, through "
                "which policies are calibrated and evaluated"
            )

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    hook = model.register_forward_hook(check)
    try:
        with attention_implementation(model, NAME):
            yield
    finally:
        hook.remove()
        AttentionInterface.register(NAME, _gone)  # the function holds a cache


def _gone(*_: Any, **__: Any) -> None:
    raise RuntimeError(f"attention implementation {NAME!r} outside of attention_function")


@torch.no_grad()
def cannot_replay(model: PreTrainedModel, calls: Sequence[AttentionSite | Unmatched]) -> str:
    """Why a pass over many tokens would not give what decode steps with these attention calls give; "" if it does.

    A replay finds a layer's role by the number that the layer's attention module has for itself, where the decode step
    goes by the cache layer: they differ in models that run modules in cycles or share one between layers.
    """
    from transformers import StaticCache

    if not continues(model):
        return "its recurrent layers can't go on with several tokens at once"
    numbers = []

    def note(module, query, key, value, attention_mask, **_):
        numbers.append(getattr(module, "layer_idx", None))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    cache = StaticCache(config=model.config, max_cache_len=2)
    try:
        with attention_function(model, note):
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), **with_cache(model, cache))
    except UnsupportedModelError as error:
        return error.message
    if numbers != [call.layer for call in calls]:
        return f"its attention modules are numbered {numbers}, and their cache layers {[call.layer for call in calls]}"
    return ""


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
    """A prefilled static cache of `length` tokens with room for all blocks, each of which starts from there.

    Make one with `make_context`. `windows` are copies of the layers that forget tokens.
    """

    cache: Any
    length: int
    blocks: tuple[Block, ...]
    windows: dict[int, Any]

    @property
    def room(self) -> int:
        """Slots behind the context."""
        return max(getattr(layer, "max_cache_len", 0) for layer in self.cache.layers) - self.length


@dataclass(frozen=True)
class Tokens:
    """Tokens of a pass: `ids [m]`, their block and their place in it `[m]`, and whether they are dense `[m]`."""

    ids: Tensor
    block: Tensor
    place: Tensor
    dense: Tensor


Observe = Callable[[int, Call, Tokens], None]  # sees each attention call: its layer, the call, the tokens of the pass


@torch.no_grad()
def make_context(model: PreTrainedModel, cache: Any, length: int, blocks: Sequence[Block]) -> Context:
    """A context from a cache that holds `length` tokens: the blocks' prompts are added to it."""
    context = Context(cache, length, tuple(blocks), windows(cache))
    if not context.windows:
        _cache_prompts(model, context)
    return context


def _cache_prompts(model: PreTrainedModel, context: Context) -> None:
    """Add the blocks' prompts to the cache, behind the context, where every replay in one pass expects them."""
    prompts, _ = _tokens(context.blocks)
    if len(prompts.ids):
        rewind(context.cache, context.length)
        _one_pass(model, context, prompts, prompts, None, None)


@torch.no_grad()
def replay(
    model: PreTrainedModel, context: Context, roles: Sequence[LayerRole], observe: Observe | None = None
) -> list[Tensor]:
    """Logits `[m - dense, vocab]` in float32 of each block's sparse steps; `observe` sees every attention call."""
    prompts, steps = _tokens(context.blocks)
    by_slot = any(role.method.by_slot for role in roles)
    if not context.windows and not by_slot:
        rewind(context.cache, context.length + len(prompts.ids))
        logits = _one_pass(model, context, steps, _joined(prompts, steps), roles, observe)
        return list(logits.split([block.steps for block in context.blocks]))
    if not context.windows and context.length % PAGE == 0 and context.room >= slots_by_page(context.blocks):
        skipped = _nobody(prompts, _whole_pages(len(prompts.ids)), -2)  # where prompts stand for other roles
        rewind(context.cache, context.length + len(skipped.ids))
        both = _filled_up(_joined(prompts, steps), len(context.blocks))
        logits = _one_pass(model, context, both, _joined(skipped, both), roles, observe)
        decoded = [(both.block == number) & ~both.dense for number in range(len(context.blocks))]
        return [logits[which] for which in decoded]
    rows = []
    for number in range(len(context.blocks)):
        rewind(context.cache, context.length, context.windows)
        both = _joined(*(_only(tokens, number) for tokens in (prompts, steps)))
        rows.append(_one_pass(model, context, both, None, roles, observe)[~both.dense])
    if not context.windows:
        _cache_prompts(model, context)
    return rows


@torch.no_grad()
def replay_text(
    model: PreTrainedModel, cache: Any, length: int, tokens: Tensor, roles: Sequence[LayerRole], chunk: int = 128
) -> Iterator[Tensor]:
    """Logits `[m, vocab]` in float32 of tokens `[1, n]`, `chunk` by chunk, after the `length` that the cache holds.

    What a chunk leaves in the cache the next one sees, as if each token had been decoded under the policy.
    """
    forgets = windows(cache)
    for start in range(0, tokens.shape[1], chunk):
        ids = tokens[0, start : start + chunk]
        none, place = torch.zeros_like(ids), torch.arange(len(ids), device=ids.device)
        part = Tokens(ids, none, place, none.bool())
        context = Context(cache, length + start, (), forgets)
        yield _one_pass(model, context, part, None if forgets else part, roles, None)


def _one_pass(
    model: PreTrainedModel, context: Context, tokens: Tokens, cached: Tokens | None, roles: Sequence[LayerRole] | None,
    observe: Observe | None,
) -> Tensor:  # fmt: skip
    """Run the model over the tokens of a pass: logits `[m, vocab]` in float32.

    `cached` are the tokens whose keys stand in the cache behind the context when a layer attends, in their order; those
    of this pass are the last of them. A query sees those of its own block up to its own place. With None, the tokens
    are one text, and the model's own mask says what they see. Without roles, every layer attends to all that is seen.
    """
    same_block = None if cached is None else tokens.block[:, None] == cached.block
    sees = None if cached is None else same_block & (tokens.place[:, None] >= cached.place)
    sets: Sets = {}
    masks: dict[int, Tensor] = {}  # by the number of slots

    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **_):
        """The model's attention: query `[1, Hq, m, D]`, key and value `[1, Hkv, n, D]` -> `[1, m, Hq, D]`."""
        n, layer = key.shape[2], module.layer_idx
        if n not in masks and sees is not None:
            masks[n] = _behind(context.length, sees, n)[None, None]
        mask = attention_mask[..., :n] if sees is None else masks[n]
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        call = Call(query, key, value, torch.tensor(n), mask, scale, s_aux, softcap or 0.0)
        role = LayerRole(layer, "full") if roles is None else roles[layer]
        out = follow(role, call, sets, _define)
        if role.is_sparse and tokens.dense.any():
            out = torch.where(tokens.dense[:, None], reference.full_attention(call), out)
        if observe is not None:
            observe(layer, call, tokens)
        return out.transpose(1, 2).contiguous(), None

    with attention_function(model, attend):
        out = model(
            input_ids=tokens.ids[None], position_ids=(context.length + tokens.place)[None],
            **with_cache(model, context.cache),
        )  # fmt: skip
    return out.logits[0].float()


def _define(op: str | Callable, *arguments: Any) -> Any:
    """What `follow` runs: the definition of an op, or a function of torch."""
    return (DEFINITIONS[op] if isinstance(op, str) else op)(*arguments)


def slots_by_page(blocks: Sequence[Block]) -> int:
    """The slots behind a context that a pass by slots takes: for all prompts, then blocks that begin with a page."""
    sizes = [sum(block.dense for block in blocks), *(block.tokens.shape[1] for block in blocks)]
    return sum(map(_whole_pages, sizes))


def _whole_pages(tokens: int) -> int:
    """The slots of the pages that hold so many tokens."""
    return -(-tokens // PAGE) * PAGE


def _filled_up(tokens: Tokens, blocks: int) -> Tokens:
    """The tokens block after block, each filled up to whole pages with tokens of no block, which are as if dense."""
    parts = []
    for number in range(blocks):
        own = _only(tokens, number)
        parts += [own, _nobody(own, _whole_pages(len(own.ids)) - len(own.ids), -1)]
    return functools.reduce(_joined, parts)


def _nobody(like: Tokens, size: int, block: int) -> Tokens:
    """Tokens as if dense, of a block that isn't one."""
    zeros = like.ids.new_zeros(size)
    return Tokens(zeros, zeros + block, zeros, zeros == 0)


def _behind(length: int, sees: Tensor, slots: int) -> Tensor:
    """Which slots of the cache each query sees `[m, slots]`: the context, and what `sees [m, c]` says of the next c."""
    mask = sees.new_zeros(sees.shape[0], slots)
    mask[:, :length] = True
    mask[:, length : length + sees.shape[1]] = sees
    return mask


def _tokens(blocks: Sequence[Block]) -> tuple[Tokens, Tokens]:
    """All prompts, and all steps."""
    ids = torch.cat([block.tokens[0] for block in blocks])
    sizes = torch.tensor([block.tokens.shape[1] for block in blocks])
    number = torch.repeat_interleave(torch.arange(len(blocks)), sizes)
    place = torch.arange(len(ids)) - (sizes.cumsum(0) - sizes)[number]
    dense = place < torch.tensor([block.dense for block in blocks])[number]
    number, place, dense = number.to(ids.device), place.to(ids.device), dense.to(ids.device)
    every = Tokens(ids, number, place, dense)
    return _where(every, dense), _where(every, ~dense)


def _where(tokens: Tokens, which: Tensor) -> Tokens:
    return Tokens(tokens.ids[which], tokens.block[which], tokens.place[which], tokens.dense[which])


def _only(tokens: Tokens, number: int) -> Tokens:
    return _where(tokens, tokens.block == number)


def _joined(first: Tokens, second: Tokens) -> Tokens:
    return Tokens(*(torch.cat(pair) for pair in zip(vars(first).values(), vars(second).values(), strict=True)))
