"""Greedy answers to a batch of prompts under any policy, from one dense prefill.

The decode steps call the ops of deployment (`attention.attention_ops`) without compiling them, so that ten policies and
budgets cost one prefill and no compilation. What they answer is what `torch.compile(backend="tidal")` answers.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import attention_ops
from ..policy import LayerRole
from ..run import positions, prefill, rewind, windows


@dataclass(frozen=True)
class Prompts:
    """A batch after the dense prefill of its contexts: the questions `[B, q]` come next.

    `mask [B, slots]` leaves out the padding on the left, `places [B, slots]` are positions; the cache holds `length`
    slots of each sequence, and has room for the questions and `new_tokens`.
    """

    questions: Tensor
    mask: Tensor
    places: Tensor
    cache: Any
    length: int
    new_tokens: int
    windows: dict[int, Any]


@torch.no_grad()
def prepare(
    model: nn.Module, contexts: Sequence[Sequence[int]], questions: Sequence[Sequence[int]], new_tokens: int
) -> Prompts:
    """Prefill the contexts, whose questions must be equally long (`ValueError`), with room for `new_tokens`."""
    if len({len(question) for question in questions}) != 1:
        raise ValueError("the questions of a batch must be equally long")
    longest = max(map(len, contexts))
    slots = longest + len(questions[0]) + new_tokens
    ids = torch.zeros(len(contexts), longest, dtype=torch.long)
    mask = torch.ones(len(contexts), slots, dtype=torch.bool)
    for row, context in enumerate(contexts):
        ids[row, longest - len(context) :] = torch.tensor(context)
        mask[row, : longest - len(context)] = False
    ids, mask = ids.to(model.device), mask.to(model.device)
    for cache in prefill(model, ids, slots, mask):  # noqa: B007  the last one is complete
        pass
    asked = torch.tensor(questions, device=model.device)
    return Prompts(asked, mask, positions(mask), cache, longest, new_tokens, windows(cache))


@torch.no_grad()
def answer(
    model: nn.Module, prompts: Prompts, roles: Sequence[LayerRole], sparse_question: bool, stop: Sequence[int]
) -> list[list[int]]:
    """The greedy answer of each prompt, up to a token of `stop` or `new_tokens`.

    The questions are read densely, as part of the prompt, or are decoded under the policy token by token.
    """
    rewind(prompts.cache, prompts.length, prompts.windows)
    if sparse_question:
        with attention_ops(model, prompts.cache, roles):
            for i in range(prompts.questions.shape[1]):
                logits = _forward(model, prompts, prompts.questions[:, i : i + 1], prompts.length + i)
    else:
        logits = _forward(model, prompts, prompts.questions, prompts.length)
    tokens = [logits.argmax(-1, keepdim=True)]
    stops = torch.tensor(stop, device=model.device)
    ended = torch.isin(tokens[-1], stops)
    with attention_ops(model, prompts.cache, roles):
        while len(tokens) < prompts.new_tokens and not ended.all():
            at = prompts.length + prompts.questions.shape[1] + len(tokens) - 1
            tokens.append(_forward(model, prompts, tokens[-1], at).argmax(-1, keepdim=True))
            ended |= torch.isin(tokens[-1], stops)
    rows = torch.cat(tokens, 1).tolist()
    return [list(itertools.takewhile(lambda token: token not in stop, row)) for row in rows]


def _forward(model: nn.Module, prompts: Prompts, tokens: Tensor, at: int) -> Tensor:
    """Logits `[B, vocab]` after the last of tokens `[B, m]`, which stand in the slots from `at` on."""
    out = model(
        input_ids=tokens, position_ids=prompts.places[:, at : at + tokens.shape[1]], attention_mask=prompts.mask,
        past_key_values=prompts.cache, use_cache=True, logits_to_keep=1,
    )  # fmt: skip
    return out.logits[:, -1].float()
