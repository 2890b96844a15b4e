"""What a KV cache in float8, or weights in int8 or int4, cost in quality: predictions and answers, densely and under a
policy.

`python benchmarks/fp8.py --model smollm2 --policy smollm2` reads passages of a text densely, all their keys and values
through the cache, and decodes their last tokens densely or under the policy: KL in nats to the dense model over a cache
in the number format, how often the likeliest token is the same, and perplexity. And it asks for pass keys at several
depths: how many answers are right, and how many are the same text. With `--weights int4`, the weights of all cases are
quantised, and compared with the dense model as it is.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tidal_compile.cache import CACHES
from tidal_compile.evaluate.tasks import FILLER, make_sample
from tidal_compile.explain import decode_calls
from tidal_compile.models import load_model, load_tokenizer
from tidal_compile.passes.match import policy_layers
from tidal_compile.policy import resolve
from tidal_compile.provenance import provenance
from tidal_compile.replay import replay_text
from tidal_compile.run import ANSWER_TOKENS, Prompt, filled, said, windows
from tidal_compile.text import default_text, ids_of
from tidal_compile.weights import quantise


def predictions(model: Any, kind: str, ids: torch.Tensor, last: int, roles: Any) -> torch.Tensor:
    """Log-probabilities `[last, vocab]` after the last tokens of ids `[1, n]`, decoded after a dense prefill."""
    length = ids.shape[1] - last
    cache = filled(model, ids[:, :length], ids.shape[1], kind=kind)
    return torch.cat(list(replay_text(model, cache, length, ids[:, length:], roles))).log_softmax(-1)


def compared(found: torch.Tensor, right: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """KL to the right predictions, agreement with them, and the mean loss of the text."""
    return {
        "kl": (right.exp() * (right - found)).sum(-1).mean().item(),
        "agreement": (right.argmax(-1) == found.argmax(-1)).float().mean().item(),
        "loss": -found[:-1].gather(1, labels[1:, None]).mean().item(),
    }


def main(
    model: str = "smollm2",
    policy: Annotated[str, typer.Option(help="Beside full.")] = "smollm2",
    weights: Annotated[str, typer.Option(help="int8, int4 or int4-32: of all cases.")] = "auto",
    length: Annotated[int, typer.Option(help="Tokens of a passage, and of a prompt.")] = 2048,
    last: Annotated[int, typer.Option(help="Of them, those that are decoded.")] = 256,
    passages: int = 4,
    prompts: int = 10,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    out: Path = Path("out/fp8.json"),
) -> None:
    """Measure, and write JSON."""
    dtype = torch.bfloat16 if device == "cuda" or weights != "auto" else torch.float32
    exact, tokenizer = load_model(model, device, dtype), load_tokenizer(model)
    net = exact if weights == "auto" else quantise(load_model(model, device, dtype), weights)
    calls, layers = decode_calls(net)
    policies = {
        name: resolve(name, layers, attention_layers=policy_layers(calls), model=model) for name in ("full", policy)
    }
    cases = [(kind, name) for name in policies for kind in CACHES]
    text = ids_of(tokenizer, default_text()[: 6 * passages * (length + 500)])
    sums: dict[tuple[str, str], list[dict[str, float]]] = {case: [] for case in cases}
    for number in range(passages):
        ids = torch.tensor([text[number * (length + 500) :][:length]], device=device)
        right = predictions(exact, "auto", ids, last, policies["full"].roles)
        for kind, name in cases:
            found = predictions(net, kind, ids, last, policies[name].roles)
            sums[kind, name].append(compared(found, right, ids[0, -last:]))
        print(f"passage {number + 1} of {passages}", flush=True)
    answers: dict[tuple[str, str], list[str]] = {case: [] for case in cases}
    wanted, dense = [], []
    for number in range(prompts):
        sample = make_sample("passkey", tokenizer, FILLER, length, (number + 0.5) / prompts, number)
        wanted.append(sample.answers[0])
        ids = torch.tensor([[*sample.context, *sample.question]], device=device)

        def answer(net: Any, kind: str, name: str, ids: torch.Tensor = ids) -> str:
            cache = filled(net, ids[:, :-1], length + 32, kind=kind)
            prompt = Prompt(ids[:, -1:], ids.shape[1], cache, windows(cache), None)
            return tokenizer.decode(said(net, policies[name], prompt, ANSWER_TOKENS).tokens)

        dense.append(answer(exact, "auto", "full"))
        for case in cases:
            answers[case].append(answer(net, *case))
        print(f"prompt {number + 1} of {prompts}", flush=True)
    records = []
    for kind, name in cases:
        means = {key: sum(one[key] for one in sums[kind, name]) / passages for key in ("kl", "agreement", "loss")}
        own = answers[kind, name]
        records.append(
            {
                "cache": kind, "policy": name, "kl": means["kl"], "agreement": means["agreement"],
                "perplexity": math.exp(means["loss"]),
                "found": sum(answer in said for answer, said in zip(wanted, own, strict=True)),
                "same_text": sum(one == other for one, other in zip(own, dense, strict=True)),
            }
        )  # fmt: skip
        print(records[-1])
    about = {"model": model, "weights": weights, "length": length, "last": last}
    about |= {"passages": passages, "prompts": prompts}
    result = {"kind": "fp8", **about, "dtype": str(dtype)[6:], **provenance(device), "records": records}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
