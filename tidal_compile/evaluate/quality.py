"""How a policy's predictions differ from the dense model's, each token given the right ones before it.

text         what follows in a text: perplexity, KL and agreement, many positions in a pass
text_steps   the same token by token with the compiled decode step, as the papers measure perplexity
answers      the tokens of the pass key that a prompt asks for
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..policy import Policy
from ..replay import Block, make_context, replay, replay_text
from ..run import Variant, decode_given, prefill, rewind, windows
from ..text import ids_of
from .tasks import Sample


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
def text_trial(model: nn.Module, ids: Sequence[int], length: int, steps: bool) -> Trial:
    """The first `length` >= 1 of ids are prefilled densely, and the rest is decoded, one by one if `steps`."""
    every = torch.tensor([ids], device=model.device)
    for cache in prefill(model, every[:, :length], len(ids)):  # noqa: B007  the last one is complete
        pass
    tokens, saved = every[:, length:-1], windows(cache)

    def logits(policy: Policy) -> Iterable[Tensor]:
        rewind(cache, length, saved)
        if steps:
            return decode_given(model, Variant(policy.name, "tidal", policy), cache, tokens)
        return replay_text(model, cache, length, tokens, policy.roles)

    return Trial(every[0, length + 1 :], logits)


@torch.no_grad()
def answer_trial(model: nn.Module, tokenizer: Any, sample: Sample) -> Trial:
    """The answer to a sample, decoded from the question's last token on; the rest of the question is prefilled."""
    answer = ids_of(tokenizer, f" {sample.answers[0]}")
    tokens = torch.tensor([[*sample.question, *answer[:-1]]], device=model.device)
    ids = torch.tensor([sample.context], device=model.device)
    for cache in prefill(model, ids, ids.shape[1] + tokens.shape[1]):  # noqa: B007  the last one is complete
        pass
    block = Block("answer", tokens, len(sample.question) - 1)
    context = make_context(model, cache, ids.shape[1], [block])
    return Trial(torch.tensor(answer, device=model.device), lambda policy: replay(model, context, policy.roles))


@torch.no_grad()
def log_probabilities(trial: Trial, policy: Policy) -> Tensor:
    """What the model predicts under a policy: `[n, vocab]`."""
    return torch.cat([logits.float().log_softmax(-1) for logits in trial.logits(policy)])


@torch.no_grad()
def judge(parts: Iterable[Tensor], dense: Tensor, labels: Tensor) -> Quality:
    """Compare logits, in parts `[m, vocab]`, with the dense model's log-probabilities and the right tokens `[n]`."""
    nll, kl, same, at = 0.0, 0.0, 0.0, 0
    for logits in parts:
        found = logits.float().log_softmax(-1)
        part = slice(at, at + len(found))
        nll -= found.gather(1, labels[part, None]).sum().item()
        kl += (dense[part].exp() * (dense[part] - found)).sum().item()
        same += (dense[part].argmax(-1) == found.argmax(-1)).sum().item()
        at += len(found)
    return Quality(at, nll / at, max(0.0, kl) / at, same / at)  # rounding can make no difference a negative one
