"""How far a policy's predictions drift from the dense model's as decoded tokens fill the cache; corrections or none.

`python benchmarks/drift.py --model smollm2 --policy smollm2 --every 0 --every 32 --every 128` decodes the tokens of a
text one by one after a dense prefill, and compares with the dense model's predictions at the same places: KL in nats
and how often the likeliest token is the same, by position. `--every n`: the last n tokens are passed through the dense
model each time that n were decoded (0: never), as `tidal_compile.generate(correct_every=n)` does.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tidal_compile.cache import LiveCache, reading
from tidal_compile.models import load_model, load_tokenizer, with_cache
from tidal_compile.provenance import provenance
from tidal_compile.run import rewind, windows
from tidal_compile.text import default_text, ids_of

BIN = 250  # decoded tokens whose mean is written


def passed(model: Any, cache: Any, tokens: torch.Tensor, start: int, chunk: int = 512) -> torch.Tensor:
    """The dense model's logits `[n, vocab]` of tokens `[1, n]` that begin in slot `start` of the cache."""
    rows = []
    for at in range(0, tokens.shape[1], chunk):
        with reading(cache, start + at):
            rows.append(model(input_ids=tokens[:, at : at + chunk], **with_cache(model, cache)).logits[0].float())
    return torch.cat(rows)


@torch.no_grad()
def drift(model: Any, policy: str, ids: torch.Tensor, prompt: int, every: int, right: torch.Tensor) -> dict[str, Any]:
    """KL and agreement by position, of predictions after each decoded token."""
    cache = LiveCache(model.config, ids.shape[1])
    passed(model, cache, ids[:, :prompt], 0)
    saved = windows(cache)
    step = torch.compile(model.forward, backend="tidal", fullgraph=True, options={"policy": policy})
    kl, agree, token = [], [], torch.zeros(1, 1, dtype=torch.long, device=model.device)
    for place in range(prompt, ids.shape[1]):
        torch.compiler.cudagraph_mark_step_begin()
        token.copy_(ids[:, place : place + 1])
        logits = step(input_ids=token, **with_cache(model, cache)).logits[0, -1].float()
        exact, sparse = right[place - prompt].log_softmax(-1), logits.log_softmax(-1)
        kl.append((exact.exp() * (exact - sparse)).sum().item())
        agree.append(float(exact.argmax() == sparse.argmax()))
        done = place + 1 - prompt
        if every and done % every == 0:
            rewind(cache, place + 1 - every, saved)
            passed(model, cache, ids[:, place + 1 - every : place + 1], place + 1 - every)
            saved = windows(cache)

    def binned(values: list[float]) -> list[float]:
        return [sum(values[at : at + BIN]) / len(values[at : at + BIN]) for at in range(0, len(values), BIN)]

    return {"every": every, "policy": policy, "kl": binned(kl), "agreement": binned(agree)}


def main(
    model: str = "smollm2",
    policy: Annotated[list[str], typer.Option(help="Repeat.")] = ("smollm2",),
    every: Annotated[list[int], typer.Option(help="Repeat; 0: no corrections.")] = (0, 32, 128),
    prompt: int = 1024,
    tokens: int = 2000,
    skip: Annotated[int, typer.Option(help="Tokens of the text before the prompt.")] = 5000,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    out: Path = Path("out/drift.json"),
) -> None:
    """Measure, and write JSON."""
    net, tokenizer = load_model(model, device, torch.float32), load_tokenizer(model)
    ids = ids_of(tokenizer, default_text()[: 6 * (skip + prompt + tokens)])[skip : skip + prompt + tokens]
    ids = torch.tensor([ids], device=device)
    with torch.no_grad():
        right = passed(net, LiveCache(net.config, ids.shape[1]), ids, 0)[prompt:].cpu().to(device)
    result = {"kind": "drift", "model": model, "prompt": prompt, "tokens": tokens, "bin": BIN, "dtype": "float32"}
    result |= provenance(device) | {"records": []}
    for name in policy:
        for number in every:
            result["records"].append(drift(net, name, ids, prompt, number, right))
            print(json.dumps(result["records"][-1]), flush=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
