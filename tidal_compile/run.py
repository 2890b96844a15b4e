"""The main job of the command line: a few prompts, decoded by several variants of one model, compared.

Every variant decodes from the same prefilled caches, rewound in between: a static layer by setting its token counter
back, so that what an earlier variant wrote becomes garbage beyond the live length, and a sliding window from a copy.
"""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from .cache import Fp8Layer, as_float8, new_cache
from .models import empty_cache, forgets, with_cache
from .prefill import read
from .variant import Variant

ANSWER_TOKENS = 12  # a number of seven digits, and what a model may say before it
WARM_UP = 3  # steps that are not timed: compilation, CUDA-graph warm-up and recording


@dataclass(frozen=True)
class Prompt:
    """A prompt whose `length` tokens but for the last one, `token [1, 1]`, were prefilled; `answer`: what it asks for.

    `windows` are copies of what the cache layers hold that forget, of this state. Random weights have no answer.
    """

    token: Tensor
    length: int
    cache: Any
    windows: Mapping[int, Any]
    answer: str | None


@dataclass(frozen=True)
class Result:
    """What a variant did: a text for each prompt and how many of them hold the answer, None for random weights; the
    tokens of the first prompt, ms of each of its timed steps, the share of the KV cache read, and the compile time.
    """

    variant: Variant
    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    found: int | None
    milliseconds: tuple[float, ...]
    kv_share: float
    compile_seconds: float

    @property
    def median_ms(self) -> float:
        """Median ms/token over the timed steps."""
        return statistics.median(self.milliseconds)


def prefill(
    model: PreTrainedModel, input_ids: Tensor, slots: int, mask: Tensor | None = None, chunk: int = 1024,
    kind: str = "auto",
) -> Iterator[Any]:  # fmt: skip
    """Fill a static cache of `slots` with input_ids `[B, n]`; `mask [B, slots]` bool leaves out padding on the left.

    Yields the cache after every chunk; the last one is complete.
    """
    cache = new_cache(model.config, slots, kind)
    for _ in read(model, input_ids, cache, mask=mask, chunk=chunk):
        yield cache


def filled(
    model: PreTrainedModel, input_ids: Tensor, slots: int, mask: Tensor | None = None, kind: str = "auto"
) -> Any:
    """The complete cache of `prefill`."""
    for cache in prefill(model, input_ids, slots, mask, kind=kind):  # noqa: B007  the last one is complete
        pass
    return cache


def random_cache(model: PreTrainedModel, length: int, slots: int, batch: int = 1, kind: str = "auto") -> Any:
    """A static cache whose first `length` tokens are random: with random weights, a prefill would be no better."""
    cache = empty_cache(model, slots, batch, kind)
    for layer in cache.layers:
        for number, name in enumerate(("keys", "values")):
            if getattr(layer, name, None) is None:
                continue
            some = getattr(layer, name)[:, :, :length]
            if isinstance(layer, Fp8Layer):
                rows, layer.scales[:, :, :length, number] = as_float8(torch.randn(some.shape, device=some.device))
                some.copy_(rows)
            else:
                some.normal_()
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length.fill_(length)
        if hasattr(layer, "cumulative_length_int"):
            layer.cumulative_length_int = length
    return cache


def windows(cache: Any) -> dict[int, dict[str, Any]]:
    """Copies of what the cache layers hold that forget what they held, such as sliding windows, for `rewind`."""
    return {number: copy.deepcopy(vars(layer)) for number, layer in enumerate(cache.layers) if forgets(layer)}


def rewind(cache: Any, length: int, saved: Mapping[int, Mapping[str, Any]] = MappingProxyType({})) -> None:
    """Make a static cache hold its first `length` tokens only; `saved` are its `windows` at that length.

    Tensors stay at their addresses, which CUDA graphs hold. What methods keep beside the cache is made anew, as after
    any write to its keys.
    """
    for number, layer in enumerate(cache.layers):
        keys = getattr(layer, "keys", None)
        if torch.is_tensor(keys) and not keys.is_inference():
            keys[:0].zero_()  # a write of nothing, which is counted
        for name, value in saved.get(number, {}).items():
            now = getattr(layer, name)
            if torch.is_tensor(value) and torch.is_tensor(now) and not now.is_inference():
                now.copy_(value)
            else:
                setattr(layer, name, copy.deepcopy(value))
        if number not in saved and torch.is_tensor(getattr(layer, "cumulative_length", None)):
            layer.cumulative_length.fill_(length)


def take_back(cache: Any, tokens: int) -> None:
    """Let a static cache whose layers forget nothing forget its last tokens, in one launch and without a wait.

    For steps that are followed by others, whose writes tell methods that what they keep beside the cache is old.
    """
    if tokens:
        torch._foreach_sub_([layer.cumulative_length for layer in cache.layers], tokens)


def shorten(cache: Any, length: int) -> int:
    """`rewind` without saved windows: the tokens that the cache has then, none of them if a layer forgets."""
    if any(map(forgets, cache.layers)):
        cache.reset()
        return 0
    rewind(cache, length)
    return length


def make_step(model: PreTrainedModel, variant: Variant) -> Callable:
    """The decode step of a variant: `eager`, `inductor`, or a policy."""
    if variant.policy is not None:
        return torch.compile(model.forward, backend="tidal", fullgraph=True, options={"policy": variant.policy})
    if variant.name == "eager":
        return model.forward
    mode = "reduce-overhead" if model.device.type == "cuda" else None
    return torch.compile(model.forward, fullgraph=True, mode=mode)


def as_new(numbers: Tensor) -> Tensor:
    """With the strides of a new tensor: part of a longer one has others even where it is one number, and a step would
    be compiled anew for each length.
    """
    return numbers.reshape(-1).view(numbers.shape)


@torch.no_grad()
def decode(model: PreTrainedModel, step: Callable, prompt: Prompt, steps: int) -> Iterator[tuple[int, float]]:
    """Greedy decoding after a prompt: yields (next token, ms of the step). The first step may compile."""
    rewind(prompt.cache, prompt.length - 1, prompt.windows)
    token = as_new(prompt.token)
    for _ in range(steps):
        torch.compiler.cudagraph_mark_step_begin()
        _synchronize(model.device)
        start = time.perf_counter()
        logits = step(input_ids=token, **with_cache(model, prompt.cache)).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        _synchronize(model.device)
        yield token.item(), (time.perf_counter() - start) * 1e3


@torch.no_grad()
def decode_given(model: PreTrainedModel, variant: Variant, cache: Any, tokens: Tensor) -> Iterator[Tensor]:
    """The logits `[1, vocab]` after each of tokens `[1, n]`, fed one by one after what the cache holds."""
    step = make_step(model, variant)
    for token in tokens.split(1, dim=1):
        torch.compiler.cudagraph_mark_step_begin()
        yield step(input_ids=as_new(token), **with_cache(model, cache)).logits[:, -1].clone()


class Listener:
    """A streamer that keeps the tokens of one sequence, and when each of them has reached the host."""

    def __init__(self, on_token: Callable[[], None] = lambda: None):
        self.tokens: list[int] = []
        self.times: list[float] = []  # seconds; the first is when the prompt was there
        self.on_token = on_token

    def put(self, value: Tensor) -> None:
        """Take the prompt `[1, n]`, and then each token `[1]`."""
        if self.times:
            self.tokens.append(int(value))
            self.on_token()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing follows."""

    @property
    def milliseconds(self) -> list[float]:
        """Of each token, from the one before it."""
        return [(after - before) * 1e3 for before, after in itertools.pairwise(self.times)]


def said(
    model: PreTrainedModel, policy: Any, prompt: Prompt, steps: int, on_token: Callable[[], None] = lambda: None
) -> Listener:
    """Greedy decoding after a prompt, by `generate` under a policy."""
    from .generate import generate  # which needs this module

    rewind(prompt.cache, prompt.length - 1, prompt.windows)
    ids = prompt.token.new_ones(1, prompt.length)  # its tokens were read; no processor looks at them
    ids[:, -1:] = prompt.token
    listener, own = Listener(on_token), model.generation_config
    model.generation_config = GenerationConfig()  # what a model's own says is not asked for here
    try:
        generate(
            model, ids, policy, streamer=listener, max_new_tokens=steps, attention_mask=torch.ones_like(ids),
            do_sample=False, pad_token_id=0, **with_cache(model, prompt.cache),
        )  # fmt: skip
    finally:
        model.generation_config = own
    return listener


def measure(
    model: PreTrainedModel, variant: Variant, prompts: Sequence[Prompt], steps: int, tokenizer: Any = None,
    on_step: Callable[[], None] = lambda: None,
) -> Result:  # fmt: skip
    """Decode `steps` tokens after the first prompt, all but the first few timed, and the answers to the other ones.

    Under a policy `generate` decodes; `eager` and `inductor` are stepped one by one.
    """
    step = None if variant.policy is not None else make_step(model, variant)

    def decoded(prompt: Prompt, steps: int, on_token: Callable[[], None]) -> tuple[list[int], list[float]]:
        if step is None:
            listener = said(model, variant.policy, prompt, steps, on_token)
            return listener.tokens, listener.milliseconds
        tokens, milliseconds = [], []
        for token, ms in decode(model, step, prompt, steps):
            tokens.append(token)
            milliseconds.append(ms)
            on_token()
        return tokens, milliseconds

    tokens, milliseconds = decoded(prompts[0], steps, on_step)
    others = []
    for prompt in prompts[1:]:
        others.append(decoded(prompt, min(steps, ANSWER_TOKENS), lambda: None)[0])
        on_step()
    texts = [] if tokenizer is None else [tokenizer.decode(ids) for ids in (tokens, *others)]
    right = [prompt.answer in text for prompt, text in zip(prompts, texts, strict=False) if prompt.answer is not None]
    return Result(
        variant, tuple(tokens), tuple(texts), sum(right) if right else None, tuple(milliseconds[WARM_UP:]),
        variant.kv_share(prompts[0].length + steps - 1), milliseconds[0] / 1e3,
    )  # fmt: skip


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
