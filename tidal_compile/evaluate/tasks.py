"""The prompts that models are asked. They are generated from a seed, and a substring match checks the answers.

    passkey         a pass key hidden in repeated filler (Mohtashami & Jaggi, arXiv 2305.16300)
    needle          a city's magic number hidden in a text, as TidalDecode measures it (arXiv 2410.05076)
    multikey        a city's magic number hidden in a text, beside the numbers of three other cities
    multivalue      all four numbers of one city
    multiquery      the numbers of four cities
    variables       the names of the variables that have one value, which each is assigned from the one before it
    common_words    the words that occur most often in a list
    frequent_words  the most frequent of made-up words, whose frequencies fall by a power law

All but the first two are modelled on RULER (Hsieh et al., arXiv 2404.06654). The score of an answer is the share
of the wanted strings that it contains.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import TidalError
from ..text import hide, ids_of, split_sentences

HEAD = "There is important information hidden inside a lot of irrelevant text. Find it and memorize it.\n"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = "\nWhat is the pass key? The pass key is"
CITIES = (
    "Accra", "Athens", "Bangkok", "Berlin", "Bogota", "Cairo", "Chicago", "Dakar", "Delhi", "Dublin", "Geneva",
    "Hanoi", "Havana", "Jakarta", "Kabul", "Lagos", "Lima", "Lisbon", "London", "Madrid", "Manila", "Miami", "Moscow",
    "Nairobi", "Oslo", "Paris", "Prague", "Quito", "Rome", "Seoul", "Sydney", "Tokyo", "Tunis", "Vienna", "Warsaw",
)  # fmt: skip
WORDS = (
    "anchor", "basket", "candle", "desert", "engine", "feather", "garden", "hammer", "insect", "jacket", "kettle",
    "ladder", "mirror", "needle", "orange", "pencil", "quarry", "ribbon", "saddle", "temple", "umbrella", "violin",
    "window", "yellow", "zipper", "barrel", "copper", "dragon", "falcon", "guitar", "helmet", "island", "jungle",
    "lantern", "marble", "napkin", "oyster", "parrot", "rocket", "silver", "ticket", "valley", "walnut", "bottle",
    "castle", "donkey", "fabric", "goblet", "hollow", "ivory", "magnet", "nectar", "piston", "rabbit", "shovel",
    "thread", "vessel", "whistle", "acorn", "bridge", "cactus", "dollar", "forest", "glacier",
)  # fmt: skip
MAGIC = "The special magic {city} number is: {number}. "


@dataclass(frozen=True)
class Sample:
    """A prompt for a model: the token ids of its `context` and `question`.

    `answers` are the strings that the model's output should contain, and `new_tokens` is how long it may be.
    """

    context: tuple[int, ...]
    question: tuple[int, ...]
    answers: tuple[str, ...]
    new_tokens: int

    def score(self, output: str) -> float:
        """Return the share of the wanted strings that an output contains."""
        return sum(answer.lower() in output.lower() for answer in self.answers) / len(self.answers)


@dataclass(frozen=True)
class _Prompt:
    """A `Sample` before its texts become token ids."""

    context: str
    question: str
    answers: Sequence[str]
    new_tokens: int


def make_sample(task: str, tokenizer: Any, text: str, length: int, depth: float, seed: int) -> Sample:
    """Make a prompt of at most `length` tokens.

    Facts are hidden in `text`, of which each seed takes another passage. `depth` is where the fact is hidden, from 0 at
    the start to 1 at the end; only the tasks in `HAS_DEPTH` use it. Raises `TidalError` for an unknown task, or a
    length that is too small for it.
    """
    if task not in TASKS:
        raise TidalError(f"unknown task {task!r}; tasks are: {', '.join(TASKS)}")
    rng = random.Random(f"{task} {length} {depth if task in HAS_DEPTH else ''} {seed}")
    try:
        prompt = TASKS[task](tokenizer, text, length, depth, rng)
    except TidalError as error:
        raise TidalError(f"task {task}, {length} tokens: {error.message}") from None
    context, question = tokenizer(prompt.context).input_ids, ids_of(tokenizer, prompt.question)
    if len(context) + len(question) > length:
        raise TidalError(f"task {task}: {length} tokens are too few for its facts and question")
    return Sample(tuple(context), tuple(question), tuple(prompt.answers), prompt.new_tokens)


def _passkey(tokenizer: Any, text: str, length: int, depth: float, rng: random.Random) -> _Prompt:
    key = str(rng.randint(10_000, 99_999))
    room = length - len(ids_of(tokenizer, QUESTION))
    context, _ = hide(tokenizer, split_sentences(FILLER), [(depth, NEEDLE.format(key=key))], room, HEAD)
    return _Prompt(context.rstrip(), QUESTION, [key], 16)


def _needle(tokenizer: Any, text: str, length: int, depth: float, rng: random.Random) -> _Prompt:
    (city,), (number,) = rng.sample(CITIES, 1), _numbers(rng, 1)
    question = f"\nWhat is the special magic {city} number? The special magic {city} number is:"
    return _hidden(tokenizer, text, length, rng, [(depth, MAGIC.format(city=city, number=number))], question, [number])


def _multikey(tokenizer: Any, text: str, length: int, depth: float, rng: random.Random) -> _Prompt:
    cities, numbers = rng.sample(CITIES, 4), _numbers(rng, 4)
    places = [depth, *(rng.random() for _ in cities[1:])]
    facts = [
        (place, MAGIC.format(city=city, number=number))
        for place, city, number in zip(places, cities, numbers, strict=True)
    ]
    question = f"\nWhat is the special magic {cities[0]} number? The special magic {cities[0]} number is:"
    return _hidden(tokenizer, text, length, rng, facts, question, numbers[:1])


def _multivalue(tokenizer: Any, text: str, length: int, depth: float, rng: random.Random) -> _Prompt:
    (city,), numbers = rng.sample(CITIES, 1), _numbers(rng, 4)
    facts = [(rng.random(), MAGIC.format(city=city, number=number)) for number in numbers]
    question = f"\nWhat are all the special magic {city} numbers? The special magic {city} numbers are:"
    return _hidden(tokenizer, text, length, rng, facts, question, numbers, 64)


def _multiquery(tokenizer: Any, text: str, length: int, depth: float, rng: random.Random) -> _Prompt:
    cities, numbers = rng.sample(CITIES, 4), _numbers(rng, 4)
    sentences = [MAGIC.format(city=city, number=number) for city, number in zip(cities, numbers, strict=True)]
    all_cities = f"{', '.join(cities[:-1])} and {cities[-1]}"
    question = f"\nWhat are the special magic {all_cities} numbers? The special magic {all_cities} numbers are:"
    facts = [(rng.random(), sentence) for sentence in sentences]
    return _hidden(tokenizer, text, length, rng, facts, question, numbers, 64)


def _variables(tokenizer: Any, text: str, length: int, depth: float, rng: random.Random) -> _Prompt:
    names = ["".join(rng.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", 5)) for _ in range(10)]
    chains, values = (names[:5], names[5:]), _numbers(rng, 2)
    facts = []
    for chain, value in zip(chains, values, strict=True):
        places = sorted(rng.random() for _ in chain)
        assignments = [f"VAR {chain[0]} = {value}. "] + [
            f"VAR {after} = VAR {before}. " for before, after in itertools.pairwise(chain)
        ]
        facts += zip(places, assignments, strict=True)
    question = (
        f"\nQuestion: Find all variables that are assigned the value {values[0]}. "
        f"Answer: the 5 variables that are assigned the value {values[0]} are:"
    )
    return _hidden(tokenizer, text, length, rng, facts, question, chains[0], 48)


def _common_words(tokenizer: Any, text: str, length: int, depth: float, rng: random.Random) -> _Prompt:
    words = rng.sample(WORDS, len(WORDS))
    common, rest = words[:5], words[5:]
    question = "\nQuestion: What are the 5 most common words in the list? Answer: The 5 most common words are:"
    entry_tokens = sum(len(ids_of(tokenizer, f" {length // 6}. {word}")) for word in WORDS) / len(WORDS)
    entries = int((length - len(ids_of(tokenizer, question)) - 32) / entry_tokens)
    if entries < 20:
        raise TidalError(f"there is room for {max(0, entries)} words; 20 are needed")
    listed = common * (entries // 10)  # each of them is a tenth of the list
    listed += itertools.islice(itertools.cycle(rest), entries - len(listed))
    rng.shuffle(listed)
    numbered = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
    context = f"Below is a numbered list of words. Memorize the most common ones.\n{numbered}"
    return _Prompt(context, question, common, 48)


def _frequent_words(tokenizer: Any, text: str, length: int, depth: float, rng: random.Random) -> _Prompt:
    letters = "bcdfglmnprstvz"
    coded = ["".join(rng.choice(letters) + rng.choice("aeiou") for _ in range(3)) for _ in range(40)]
    question = "\nQuestion: What are the 3 most frequent words? Answer: The 3 most frequent words are:"
    shares = [1 / (rank + 1) ** 2 for rank in range(len(coded))]
    sizes = [len(ids_of(tokenizer, f" {word}")) for word in coded]
    word_tokens = sum(size * share for size, share in zip(sizes, shares, strict=True)) / sum(shares)
    total = (length - len(ids_of(tokenizer, question)) - 32 - sum(sizes)) / word_tokens  # words beside one of each
    if total < 40:
        raise TidalError(f"there is room for {max(0, int(total))} words beside one of each; 40 are needed")
    counts = [1 + int(total * share / sum(shares)) for share in shares]
    listed = [word for word, count in zip(coded, counts, strict=True) for _ in range(count)]
    rng.shuffle(listed)
    context = f"Read the following coded words and keep track of how often each one is used.\n{' '.join(listed)}"
    return _Prompt(context, question, coded[:3], 32)


def _hidden(
    tokenizer: Any, text: str, length: int, rng: random.Random, facts: Sequence[tuple[float, str]], question: str,
    answers: Sequence[str], new_tokens: int = 24,
) -> _Prompt:  # fmt: skip
    """Make a prompt of facts that are hidden in the text, which starts at a random sentence and goes round."""
    sentences = split_sentences(text)
    start = rng.randrange(len(sentences)) if sentences else 0
    room = length - len(ids_of(tokenizer, question)) - 4
    context, _ = hide(tokenizer, sentences[start:] + sentences[:start], facts, room)
    return _Prompt(context.rstrip(), question, answers, new_tokens)


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]


TASKS: dict[str, Callable[[Any, str, int, float, random.Random], _Prompt]] = {
    "passkey": _passkey,
    "needle": _needle,
    "multikey": _multikey,
    "multivalue": _multivalue,
    "multiquery": _multiquery,
    "variables": _variables,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
}
HAS_DEPTH = ("passkey", "needle", "multikey")
NEEDLES, SYNTHETIC = ("passkey", "needle"), tuple(TASKS)[2:]
