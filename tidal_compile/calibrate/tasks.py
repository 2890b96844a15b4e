"""What a policy is calibrated on: contexts made from a text, each prefilled once, and blocks decoded from them.

There are three kinds of blocks:

    text    the text goes on
    answer  the answers to questions about facts that are hidden in the context: a pass key, and numbers by name
    copy    a passage of the context again, of which the block gives the first tokens

Plain prose hardly needs distant tokens, so a policy that loses them still looks good on it, but not on answers and
copies. Every second context hides its facts in the repeated filler of the pass-key task instead of the text.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TidalError
from ..evaluate.tasks import FILLER, NEEDLE, QUESTION
from ..replay import PAGE, Block, Context, make_context, slots_by_page
from ..run import filled
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
COPY_FROM, COPY_TO = 8, 24  # tokens of a copied passage: those that the block gives, and all
FACTS = 3  # numbers by name in a context, beside the pass key
TEXT_TOKENS = 96  # tokens of a text block


def make_contexts(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    length: int,
    contexts: int,
    text_tokens: int = TEXT_TOKENS,
    seed: int = 0,
) -> Iterator[Context]:
    """Make `contexts` of about `length` tokens, in whole pages, from places spread over the text, and prefill each.

    Raises `TidalError` for a text that is too short.
    """
    if length < PAGE:
        raise TidalError(f"calibrate: context {length}; at least {PAGE} tokens are needed, a page")
    rng = random.Random(seed)
    sentences = split_sentences(text)
    sizes = [size_of(tokenizer, sentence) for sentence in sentences]
    needed = length + 2 * text_tokens
    last = len(sentences)  # the last sentence at which a context can start
    while last > 0 and sum(sizes[last:]) < needed:
        last -= 1
    if not sentences or sum(sizes) < needed:
        raise TidalError(
            f"calibrate: a context of {length} tokens needs more text: {needed} tokens, and the text has {sum(sizes)}"
        )
    for number in range(contexts):
        start = (last * number) // max(1, contexts - 1) if contexts > 1 else 0
        ids, blocks = _compose(tokenizer, sentences[start:], length, text_tokens, number % 2 == 1, rng)
        yield _prefill(model, ids, blocks)


def _compose(
    tokenizer: Any, sentences: Sequence[str], length: int, text_tokens: int, filler: bool, rng: random.Random
) -> tuple[list[int], list[Block]]:
    """The tokens of a context, and its blocks. With `filler`, facts are hidden in filler, and no text block follows."""
    keys = rng.sample(range(10_000, 100_000), FACTS + 1)
    names = rng.sample(NAMES, FACTS)
    facts = [NEEDLE.format(key=keys[0])] + [
        FACT.format(name=name, key=key) for name, key in zip(names, keys[1:], strict=True)
    ]
    questions = [QUESTION] + [ASK.format(name=name) for name in names]
    length = length // PAGE * PAGE
    haystack = split_sentences(FILLER) if filler else sentences
    body, taken = hide(tokenizer, haystack, [(rng.random(), fact.strip() + " ") for fact in facts], length)
    ids = tokenizer(body.rstrip()).input_ids[:length]
    first = int(ids[0] == getattr(tokenizer, "bos_token_id", None))
    ids[first:first] = ids_of(tokenizer, FILLER * PAGE)[: -len(ids) % PAGE]

    blocks = [_answer(tokenizer, question, key) for question, key in zip(questions, keys, strict=True)]
    start = rng.randrange(len(ids) * 3 // 4)
    passage = ids[start : start + COPY_TO]
    blocks.append(_block("copy", ids_of(tokenizer, "\n") + passage, COPY_FROM))
    if not filler:
        blocks.append(_block("text", ids_of(tokenizer, "".join(sentences[taken:][:text_tokens]))[:text_tokens], 0))
    return ids, blocks


def _answer(tokenizer: Any, question: str, key: int) -> Block:
    """A question and its answer. Decoding starts at the question's last token; those before it belong to the prompt."""
    question_ids, answer_ids = ids_of(tokenizer, question), ids_of(tokenizer, f" {key}")
    return _block("answer", question_ids + answer_ids[:-1], len(question_ids) - 1, answer_ids)


def _block(kind: str, tokens: list[int], dense: int, labels: list[int] | None = None) -> Block:
    return Block(kind, torch.tensor([tokens]), dense, None if labels is None else torch.tensor(labels))


def _prefill(model: nn.Module, ids: list[int], blocks: list[Block]) -> Context:
    """A context with a cache of `ids` and room for all blocks, on the model's device."""
    slots = len(ids) + slots_by_page(blocks)
    cache = filled(model, torch.tensor([ids], device=model.device), slots)
    on_device = tuple(
        Block(block.kind, block.tokens.to(model.device), block.dense, _to(block.labels, model.device))
        for block in blocks
    )
    return make_context(model, cache, len(ids), on_device)


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
