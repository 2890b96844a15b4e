"""What each model family is expected to look like to the matcher, and the table of it in the documentation.

`python tests/families.py` writes the table into docs/models.md; a test checks that it is there as written.
"""

from dataclasses import dataclass
from pathlib import Path

from policies import one_selects

PAGE = Path(__file__).parent.parent / "docs/models.md"
BEGIN, END = "<!-- families: written by tests/families.py -->\n", "<!-- end of families -->\n"
SLIDING = "sliding-window layer: left as it is"
LATENT = "the keys are computed from what the cache holds (multi-head latent attention)"
BOTH = ("sdpa", "eager")


@dataclass(frozen=True)
class Family:
    """`sites` of the tiny model's attention calls are rewritten, `left` others are not, for this `reason`."""

    sites: int = 6
    left: int = 0
    reason: str = ""
    implementations: tuple[str, ...] = BOTH
    note: str = ""

    @property
    def layers(self):
        """The layers with attention that can be rewritten: all, or every second one."""
        return list(range(6)) if self.sites == 6 else list(range(1, 6, 2)) if self.sites else []


MIXED = Family(sites=3, left=3, reason=SLIDING)
FAMILIES = {
    "llama": Family(),
    "mistral": Family(note="with a sliding window in all layers only `full` applies"),
    "mixtral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "qwen3_moe": Family(),
    "phi": Family(),
    "phi3": Family(),
    "gemma": Family(),
    "gemma2": Family(3, 3, SLIDING, ("eager",), "soft-capped scores"),
    "gemma3": MIXED,
    "olmo2": Family(),
    "granite": Family(),
    "cohere": Family(),
    "cohere2": MIXED,
    "glm4": Family(),
    "stablelm": Family(),
    "starcoder2": Family(note="with a sliding window in all layers only `full` applies"),
    "smollm3": Family(),
    "nemotron": Family(),
    "helium": Family(),
    "gpt_neox": Family(),
    "gpt2": Family(),
    "gpt_oss": Family(3, 3, SLIDING, ("eager",), "attention sinks"),
    "qwen3_next": Family(sites=3, note="linear-attention layers are no attention calls, and stay as they are"),
    "deepseek_v3": Family(sites=0, left=6, reason=LATENT),
    "exaone4": MIXED,
}


def first_selects(name, depth):
    """A policy for its first layers, of which the first that can select does, and the others reuse; and which can."""
    layers = [layer for layer in FAMILIES[name].layers if layer < depth]
    return one_selects(depth, layers), layers


def table():
    """The support table in Markdown."""
    rows = ["| family | rewritten | through | left as it is, or of note |", "|---|---|---|---|"]
    for name, family in FAMILIES.items():
        what = {6: "all layers", 3: "every full-attention layer", 0: "none"}[family.sites]
        left = [family.reason.removesuffix(": left as it is") + "s" if family.reason == SLIDING else family.reason]
        notes = "; ".join(filter(None, [*left, family.note]))
        rows.append(f"| {name} | {what} | {', '.join(family.implementations)} | {notes} |")
    return "\n".join(rows) + "\n"


def with_table(text):
    """The page with the table of today."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
