"""How a policy's predictions differ from the dense model's, each token given the right ones before it.

text         what follows in a text: perplexity, KL and agreement, many positions in a pass where the model allows it
text_steps   the same token by token with the compiled decode step, as the papers measure perplexity
answers      the tokens of the pass key that a prompt asks for
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models import with_cache
from ..policy import Policy
from ..replay import Block, make_context, replay, replay_text
from ..run import as_new, decode_given, filled, rewind, windows
from ..step import PolicyStep
from ..text import ids_of
from ..variant import Variant
from .tasks import Sample


@dataclass(frozen=True)
class Decoder:
    """How a model's decode steps are followed: one by one, and many in a pass where that gives the same (`replays`)."""

    step: PolicyStep
    replays: bool


@dataclass(frozen=True)
class Trial:
    """Tokens to decode: the right one after each, `labels [n]`, and a policy's `logits`, in parts `[m, vocab]`."""

    labels: Tensor
    logits: Callable[[Policy], Iterable[Tensor]]


@dataclass(frozen=True)
class Quality:
    """Means over `tokens` positions.

    `nll` of the right token in nats, `kl` from dense in nats, and `agreement`, how often the likeliest token is the
    dense model's.
    """

    tokens: int
    nll: float
    kl: float
    agreement: float


@torch.no_grad()
def text_trial(model: PreTrainedModel, ids: Sequence[int], length: int, decoder: Decoder, compiled: bool) -> Trial:
    """The first `length` >= 1 of ids are prefilled densely, and the rest is decoded, by the compiled step if asked."""
    every = torch.tensor([ids], device=model.device)
    cache = filled(model, every[:, :length], len(ids))
    tokens, saved = every[:, length:-1], windows(cache)

    def logits(policy: Policy) -> Iterable[Tensor]:
        rewind(cache, length, saved)
        if compiled:
            return decode_given(model, Variant(policy.name, policy), cache, tokens)
        if decoder.replays:
            return replay_text(model, cache, length, tokens, policy.roles)
        return decode_steps(model, decoder.step, cache, tokens, policy)

    return Trial(every[0, length + 1 :], logits)


@torch.no_grad()
def answer_trial(model: PreTrainedModel, tokenizer: Any, sample: Sample, decoder: Decoder) -> Trial:
    """The answer to a sample, decoded from the question's last token on; the rest of the question is prefilled."""
    answer = ids_of(tokenizer, f" {sample.answers[0]}")
    labels = torch.tensor(answer, device=model.device)
    if not decoder.replays:
        ids = [*sample.context, *sample.question, *answer]
        return text_trial(model, ids, len(ids) - len(answer) - 1, decoder, compiled=False)
    tokens = torch.tensor([[*sample.question, *answer[:-1]]], device=model.device)
    ids = torch.tensor([sample.context], device=model.device)
    cache = filled(model, ids, ids.shape[1] + tokens.shape[1])
    block = Block("answer", tokens, len(sample.question) - 1)
    context = make_context(model, cache, ids.shape[1], [block])
    return Trial(labels, lambda policy: replay(model, context, policy.roles))


@torch.no_grad()
def decode_steps(
    model: PreTrainedModel, step: PolicyStep, cache: Any, tokens: Tensor, policy: Policy
) -> Iterator[Tensor]:
    """The logits `[1, vocab]` after each of tokens `[1, n]`, decoded one by one by the uncompiled step."""
    for token in tokens.split(1, dim=1):
        token = as_new(token)
        yield step(policy.roles, input_ids=token, **with_cache(model, cache)).logits[:, -1].clone()


@torch.no_grad()
def log_probabilities(trial: Trial, policy: Policy) -> Tensor:
    """What the model predicts under a policy: `[n, vocab]`."""
    return torch.cat([logits.float().log_softmax(-1) for logits in trial.logits(policy)])


@torch.no_grad()
def judge(parts: Iterable[Tensor], dense: Tensor, labels: Tensor) -> Quality:
    """Compare logits, in parts `[m, vocab]`, with the dense model's log-probabilities and the right tokens `[n]`."""
    nll, kl, same, at = 0.0, 0.0, 0.0, 0
    for logits in parts:
        sparse = logits.float().log_softmax(-1)
        part = slice(at, at + len(sparse))
        nll -= sparse.gather(1, labels[part, None]).sum().item()
        kl += (dense[part].exp() * (dense[part] - sparse)).sum().item()
        same += (dense[part].argmax(-1) == sparse.argmax(-1)).sum().item()
        at += len(sparse)
    return Quality(at, nll / at, max(0.0, kl) / at, same / at)  # rounding can make no difference a negative one
