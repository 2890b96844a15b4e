"""Pass-key retrieval: a number hidden in repeated filler, to be recalled (Mohtashami & Jaggi, arXiv 2305.16300)."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HEAD = "There is important information hidden inside a lot of irrelevant text. Find it and memorize it.\n"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class PassKey:
    """A prompt `[1, n]` of about the length asked for, and the key that its answer must contain."""

    input_ids: Tensor
    key: str


def passkey_prompt(tokenizer: Any, num_tokens: int, depth: float = 0.3, seed: int = 0) -> PassKey:
    """A prompt of at most `num_tokens` tokens, with the key at `depth` (0: start, 1: end) of the filler."""
    key = str(random.Random(seed).randint(10_000, 99_999))

    def count(text: str) -> int:
        return len(tokenizer(text).input_ids)

    fixed = count(HEAD + NEEDLE.format(key=key) + QUESTION)
    each = (count(FILLER * 11) - count(FILLER)) / 10  # neighbouring repeats may share a token
    repeats = max(1, int((num_tokens - fixed) / each))
    before = round(repeats * depth)
    text = HEAD + FILLER * before + NEEDLE.format(key=key) + FILLER * (repeats - before) + QUESTION
    return PassKey(torch.tensor([tokenizer(text).input_ids]), key)
