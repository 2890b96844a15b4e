"""Greedy answers to a batch of prompts under any policy, from one dense prefill.

The decode steps are those of deployment, uncompiled (`step.PolicyStep`), so that ten policies and budgets cost one
prefill and no compilation. They answer as `torch.compile(backend="tidal")` does.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models import continues, is_recurrent_model, with_cache
from ..passes.roles import LayerRole
from ..prefill import positions
from ..run import as_new, filled, rewind, windows
from ..step import PolicyStep

SLOTS = 128  # cache sizes are multiples of it: the decode step is traced once for each size


@dataclass(frozen=True)
class Prompts:
    """A batch after the dense prefill of its contexts: the questions `[B, q]` come next.

    `mask [B, slots]` leaves out the padding on the left, `places [B, slots]` are positions. The cache holds `length`
    slots of each sequence, and has room for the questions and `new_tokens`. Recurrent models take no mask.
    """

    questions: Tensor
    mask: Tensor | None
    places: Tensor
    cache: Any
    length: int
    new_tokens: int
    windows: dict[int, Any]


@torch.no_grad()
def prepare(
    model: PreTrainedModel, contexts: Sequence[Sequence[int]], questions: Sequence[Sequence[int]], new_tokens: int
) -> Prompts:
    """Prefill the contexts, with room for `new_tokens`.

    Raises `ValueError` for questions that are not equally long and, in recurrent models, for such contexts.
    """
    recurrent = is_recurrent_model(model)
    if len({len(question) for question in questions}) != 1:
        raise ValueError("the questions of a batch must be equally long")
    if recurrent and len({len(context) for context in contexts}) != 1:
        raise ValueError("the contexts of a batch must be equally long: recurrent layers see padding")
    longest = max(map(len, contexts))
    slots = -(-(longest + len(questions[0]) + new_tokens) // SLOTS) * SLOTS
    ids = torch.zeros(len(contexts), longest, dtype=torch.long)
    mask = torch.ones(len(contexts), slots, dtype=torch.bool)
    for row, context in enumerate(contexts):
        ids[row, longest - len(context) :] = torch.tensor(context)
        mask[row, : longest - len(context)] = False
    ids, mask = ids.to(model.device), mask.to(model.device)
    places = positions(mask)
    mask = None if recurrent else mask
    cache = filled(model, ids, slots, mask)
    asked = torch.tensor(questions, device=model.device)
    return Prompts(asked, mask, places, cache, longest, new_tokens, windows(cache))


@torch.no_grad()
def answer(
    model: PreTrainedModel, step: PolicyStep, prompts: Prompts, roles: Sequence[LayerRole], sparse_question: bool,
    stop: Sequence[int],
) -> list[list[int]]:  # fmt: skip
    """The greedy answer of each prompt, up to a token of `stop` or `new_tokens`, by decode steps of the model.

    The questions are read densely, as part of the prompt, or are decoded under the policy token by token.
    """
    dense = [LayerRole(role.layer, "full") for role in roles]

    def decode(as_roles: Sequence[LayerRole], token: Tensor, at: int) -> Tensor:
        return _logits(model, prompts, lambda **inputs: step(as_roles, **inputs), as_new(token), at)

    rewind(prompts.cache, prompts.length, prompts.windows)
    if sparse_question or not continues(model):
        for number, token in enumerate(prompts.questions.split(1, dim=1)):
            logits = decode(roles if sparse_question else dense, token, prompts.length + number)
    else:
        logits = _logits(model, prompts, model, prompts.questions, prompts.length)
    tokens = [logits.argmax(-1, keepdim=True)]
    stops = torch.tensor(stop, device=model.device)
    ended = torch.isin(tokens[-1], stops)
    while len(tokens) < prompts.new_tokens and not ended.all():
        at = prompts.length + prompts.questions.shape[1] + len(tokens) - 1
        tokens.append(decode(roles, tokens[-1], at).argmax(-1, keepdim=True))
        ended |= torch.isin(tokens[-1], stops)
    rows = torch.cat(tokens, 1).tolist()
    return [list(itertools.takewhile(lambda token: token not in stop, row)) for row in rows]


def _logits(model: PreTrainedModel, prompts: Prompts, forward: Callable, tokens: Tensor, at: int) -> Tensor:
    """Logits `[B, vocab]` after the last of tokens `[B, m]`, which stand in the slots from `at` on."""
    padding = {}
    if prompts.mask is not None:
        places = prompts.places[:, at : at + tokens.shape[1]].contiguous()
        padding = {"position_ids": places, "attention_mask": prompts.mask}
    out = forward(input_ids=tokens, logits_to_keep=1, **with_cache(model, prompts.cache), **padding)
    return out.logits[:, -1].float()
