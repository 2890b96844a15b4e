"""What a policy is calibrated on: contexts made of a text, each prefilled once, and blocks that are decoded from them.

    text    the text goes on
    answer  facts that were hidden in the text are asked for: a pass key, and numbers by name
    copy    a passage of the text is begun, and goes on

Plain prose hardly needs what stands far away, so a policy that loses it looks good there; answers and copies do. Half
of the contexts hide their facts in the repeated filler of the pass-key task instead of the text.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TidalError
from ..evaluate.tasks import FILLER, NEEDLE, QUESTION
from ..replay import Block, Context, make_context
from ..run import prefill
from ..text import hide, ids_of, size_of, split_sentences

NAMES = (
    "Amber",
    "Birch",
    "Cedar",
    "Delta",
    "Ember",
    "Falcon",
    "Granite",
    "Harbor",
    "Island",
    "Juniper",
    "Kestrel",
    "Lotus",
)
FACT = " The number of {name} is {key}."
ASK = "\nWhat is the number of {name}? The number of {name} is"
COPY_FROM, COPY_TO = 8, 24  # tokens of a passage: begun, in all
FACTS = 3  # by name, of a context
TEXT_TOKENS = 96  # of a block in which the text goes on: the longest


def make_contexts(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    length: int,
    contexts: int,
    text_tokens: int = TEXT_TOKENS,
    seed: int = 0,
) -> Iterator[Context]:
    """`contexts` of about `length` tokens from places spread over the text, prefilled one by one.

    Raises `TidalError` for a text that is too short.
    """
    rng = random.Random(seed)
    sentences = split_sentences(text)
    sizes = [size_of(tokenizer, sentence) for sentence in sentences]
    needed = length + 2 * text_tokens
    last = len(sentences)
    while last > 0 and sum(sizes[last:]) < needed:
        last -= 1
    if not sentences or sum(sizes) < needed:
        raise TidalError(f"calibrate: a context of {length} tokens needs more text than the {sum(sizes)} tokens found")
    for number in range(contexts):
        start = (last * number) // max(1, contexts - 1) if contexts > 1 else 0
        yield _prefilled(model, *_blocks(tokenizer, sentences[start:], length, text_tokens, number % 2 == 1, rng))


def _blocks(
    tokenizer: Any, sentences: Sequence[str], length: int, text_tokens: int, filler: bool, rng: random.Random
) -> tuple[list[int], list[Block]]:
    """A context's tokens, and its blocks."""
    keys = rng.sample(range(10_000, 100_000), FACTS + 1)
    names = rng.sample(NAMES, FACTS)
    facts = [NEEDLE.format(key=keys[0])] + [
        FACT.format(name=name, key=key) for name, key in zip(names, keys[1:], strict=True)
    ]
    questions = [QUESTION] + [ASK.format(name=name) for name in names]
    hay = split_sentences(FILLER) if filler else sentences
    body, taken = hide(tokenizer, hay, [(rng.random(), fact.strip() + " ") for fact in facts], length)
    ids = tokenizer(body.rstrip()).input_ids[:length]

    blocks = [_answer(tokenizer, question, key) for question, key in zip(questions, keys, strict=True)]
    start = rng.randrange(len(ids) * 3 // 4)
    passage = ids[start : start + COPY_TO]
    blocks.append(_block("copy", ids_of(tokenizer, "\n") + passage, COPY_FROM))
    if not filler:
        blocks.append(_block("text", ids_of(tokenizer, "".join(sentences[taken:][:text_tokens]))[:text_tokens], 0))
    return ids, blocks


def _answer(tokenizer: Any, question: str, key: int) -> Block:
    """The answer is decoded from the question's last token on; the rest of the question belongs to the prompt."""
    asked, answer = ids_of(tokenizer, question), ids_of(tokenizer, f" {key}")
    return _block("answer", asked + answer[:-1], len(asked) - 1, answer)


def _block(kind: str, tokens: list[int], dense: int, labels: list[int] | None = None) -> Block:
    return Block(kind, torch.tensor([tokens]), dense, None if labels is None else torch.tensor(labels))


def _prefilled(model: nn.Module, ids: list[int], blocks: list[Block]) -> Context:
    slots = len(ids) + sum(block.tokens.shape[1] for block in blocks)
    for cache in prefill(model, torch.tensor([ids], device=model.device), slots):  # noqa: B007  the last one is complete
        pass
    moved = tuple(
        Block(block.kind, block.tokens.to(model.device), block.dense, _to(block.labels, model.device))
        for block in blocks
    )
    return make_context(model, cache, len(ids), moved)


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
