"""Policies on what a calibration has not seen: `python benchmarks/held_out.py --policy FILE --policy tidal`.

Prose is the text of Python's own manual (`pydoc_data.topics`), one block of 64 tokens a context. Answers are those of
pass-key prompts (`evaluate.passkey`) with other keys and depths, decoded from the question's last token on, each step
given the right tokens: `found` counts the prompts at which the likeliest token is the key's at every step, which is
when greedy decoding finds it. KL is to the dense model, in nats. Writes JSON to `benchmarks/results/`.
"""

import argparse
import json
import pydoc_data.topics
from pathlib import Path

import torch

from tidal_compile.calibrate.replay import Block, make_context
from tidal_compile.calibrate.search import dense_predictions, measure
from tidal_compile.cli import _provenance
from tidal_compile.evaluate.passkey import passkey_prompt
from tidal_compile.models import load_model, load_tokenizer
from tidal_compile.policy import resolve
from tidal_compile.run import prefill

RESULTS = Path(__file__).parent / "results"
PROSE, STEPS = 3, 64
FIRST_SEED = 1000


def context_of(model, ids, block, dense=0, labels=None, kind="text"):
    """The ids `[n]` prefilled, and one block."""
    tokens = torch.tensor([[*ids, 0]], device=model.device)
    for cache in prefill(model, tokens, len(ids) + len(block)):  # noqa: B007  the last one is complete
        pass
    labels = None if labels is None else torch.tensor(labels, device=model.device)
    return make_context(
        model, cache, len(ids), [Block(kind, torch.tensor([block], device=model.device), dense, labels)]
    )


def prose_contexts(model, tokenizer, length):
    """Contexts of `length` tokens of the manual, and what follows each."""
    ids = tokenizer("\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))).input_ids
    step = len(ids) // PROSE
    for start in range(0, step * PROSE, step):
        part = ids[start : start + length + STEPS]
        yield context_of(model, part[:length], part[length:])


def answer_contexts(model, tokenizer, length, prompts):
    """Pass-key prompts, the keys at depths from start to end, and the answers."""
    for number in range(prompts):
        prompt = passkey_prompt(tokenizer, length, (number + 0.5) / prompts, FIRST_SEED + number)
        ids = prompt.input_ids[0].tolist()
        answer = tokenizer(f" {prompt.key}", add_special_tokens=False).input_ids
        yield context_of(model, ids[:-1], [ids[-1], *answer[:-1]], labels=answer, kind="answer")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--policy", action="append", required=True)
    parser.add_argument("--budget", type=int, action="append", help="default: each policy's own")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--name", default="held-out")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(options.model, device, torch.bfloat16 if device == "cuda" else torch.float32)
    tokenizer, layers = load_tokenizer(options.model), model.config.num_hidden_layers
    rows = {}
    with torch.no_grad():
        for kind in ("text", "answer"):
            made = (
                prose_contexts(model, tokenizer, options.context)
                if kind == "text"
                else answer_contexts(model, tokenizer, options.context, options.prompts)
            )
            for context in made:  # one at a time: their caches are large
                dense = dense_predictions(model, [context], layers)
                for name in options.policy:
                    for budget in options.budget or [None]:
                        change = {} if budget is None else {"budget": budget}
                        policy = resolve(name, layers, model=options.model, **change)
                        score = measure(model, [context], dense, policy.roles, {kind: 1.0})
                        right = kind == "answer" and torch.equal(dense[0][0].argmax(-1), context.blocks[0].labels)
                        row = rows.setdefault((name, budget), {"text": [], "answer": [], "found": 0, "dense_found": 0})
                        row[kind].append(score.kl[kind])
                        row["dense_found"] += right
                        row["found"] += right and score.answered == 1.0
    results = [
        {"policy": Path(name).stem, "budget": budget, "found": row["found"], "dense_found": row["dense_found"],
         **{f"kl_{kind}": sum(row[kind]) / len(row[kind]) for kind in ("text", "answer")}}
        for (name, budget), row in rows.items()
    ]  # fmt: skip
    about = vars(options) | {"policy": [Path(name).name for name in options.policy]}
    record = {"kind": "held-out", **about, "held_out": results, **_provenance(device)}
    record["command"] = f"python benchmarks/held_out.py --name {options.name} " + " ".join(
        [f"--policy {Path(name).name}" for name in options.policy] + [f"--budget {one}" for one in options.budget or []]
    )
    file = RESULTS / f"{options.name}-{options.model}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    for one in results:
        print(one)
    print("wrote", file.name)


if __name__ == "__main__":
    main()
