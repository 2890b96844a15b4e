"""`exact=True`: how many drafts hold on real text, whether the answers are the dense model's, and what it gains.

    python benchmarks/exact.py answers --model smollm2 --policy smollm2 --policy tidal
    python benchmarks/exact.py speed --model random:llama-2-7b --case 100000x1 --acceptance 0.97

`answers` asks prompts of the evaluation and goes on from passages of its text, greedily, and compares token by token
with the dense model. `speed` has random weights, whose drafts mean nothing: each draft of each row holds by chance, as
likely as `--acceptance` says, and everything is computed as it is otherwise.
"""

import dataclasses
import gc
import itertools
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import tidal_compile as tc
from tidal_compile import drafts
from tidal_compile.cache import LiveCache
from tidal_compile.evaluate.tasks import make_sample
from tidal_compile.models import load_model, load_tokenizer
from tidal_compile.provenance import provenance
from tidal_compile.run import random_cache, rewind
from tidal_compile.text import default_text, ids_of

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TASKS = ("passkey", "needle", "multikey", "multiquery", "passage")


def prompt_of(task: str, tokenizer: Any, text: str, length: int, number: int) -> tuple[list[int], int]:
    """Token ids, and how many tokens to answer with."""
    if task == "passage":
        start = 700 * number
        return ids_of(tokenizer, text[start * 6 : (start + length) * 8])[:length], 64
    sample = make_sample(task, tokenizer, text, length, (number % 7 + 0.5) / 7, number)
    return [*sample.context, *sample.question], 24


@app.command()
def answers(
    model: str = "smollm2",
    policy: Annotated[list[str], typer.Option(help="Repeat.")] = ("smollm2", "tidal"),
    prompts: Annotated[int, typer.Option(help="Of all tasks together.")] = 100,
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 3000,
    out: Path = Path("out/exact-answers.json"),
) -> None:
    """Compare answers with the dense model's, and write JSON."""
    net, tokenizer, text = load_model(model, DEVICE, torch.float32), load_tokenizer(model), default_text()
    result: dict[str, Any] = {"kind": "exact-answers", "model": model, "length": length, "dtype": "float32"}
    result |= provenance(DEVICE) | {"records": []}
    cache = LiveCache(net.config, length + 128)
    given = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "past_key_values": cache}
    counts = {name: {task: drafts.Drafting() for task in TASKS} for name in policy}
    wrong = dict.fromkeys(policy, 0)
    for number in range(prompts):
        task = TASKS[number % len(TASKS)]
        prompt, new_tokens = prompt_of(task, tokenizer, text, length, number)
        ids = torch.tensor([prompt], device=DEVICE)
        if number:
            rewind(cache, 0)
        dense = tc.generate(net, ids, max_new_tokens=new_tokens, **given)
        for name in policy:
            rewind(cache, ids.shape[1] - 1)
            drafting = drafts.Drafting(4)
            got = tc.generate(net, ids, name, exact=drafting, max_new_tokens=new_tokens, **given)
            wrong[name] += not torch.equal(got, dense)
            total = counts[name][task]
            for field in ("cycles", "drafted", "accepted", "rejected"):
                setattr(total, field, getattr(total, field) + getattr(drafting, field))
        print(number + 1, wrong, {name: sum_of(counts[name].values()).acceptance for name in policy}, flush=True)
    for name in policy:
        record = {"policy": name, "prompts": prompts, "differ": wrong[name]}
        record |= {"acceptance": sum_of(counts[name].values()).acceptance, "drafts_a_cycle": 4}
        record |= {"by_task": {task: one.acceptance for task, one in counts[name].items()}}
        result["records"].append(record)
    write(out, result)


def sum_of(parts: Any) -> drafts.Drafting:
    """All counts together."""
    total = drafts.Drafting()
    for part in parts:
        total.accepted, total.rejected = total.accepted + part.accepted, total.rejected + part.rejected
    return total


@app.command()
def speed(
    model: str = "random:llama-2-7b",
    policy: Annotated[list[str], typer.Option(help="Repeat.")] = ("tidal",),
    case: Annotated[list[str], typer.Option(help="Context x batch; repeat.")] = ("100000x1",),
    acceptance: Annotated[list[float], typer.Option(help="Repeat.")] = (0.97,),
    drafted: Annotated[list[int], typer.Option(help="Drafts a cycle; 0: as many as pay. Repeat.")] = (0,),
    tokens: int = 256,
    out: Path = Path("out/exact-speed.json"),
) -> None:
    """Time tokens beside the dense loop, and write JSON."""
    net = load_model(model, DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    result: dict[str, Any] = {"kind": "exact-speed", "model": model, "dtype": str(net.dtype).removeprefix("torch.")}
    result |= provenance(DEVICE) | {"tokens": tokens, "records": []}
    for one in case:
        context, batch = map(int, one.split("x"))
        cache = random_cache(net, context - 1, context + tokens + drafts.WIDTH, batch)
        ids = torch.randint(net.config.vocab_size, (batch, context), device=DEVICE)
        given = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "past_key_values": cache}
        given |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens}

        def timed(*arguments: Any, cache=cache, context=context, ids=ids, given=given, **options: Any) -> float:
            """ms a token, warm."""
            for _ in range(3):
                rewind(cache, context - 1)
                settle()
                start = time.perf_counter()
                tc.generate(net, ids, *arguments, **given, **{name: make() for name, make in options.items()})
                settle()
            return (time.perf_counter() - start) / tokens * 1e3

        record = {"case": one, "variant": "full", "ms_per_token": timed()}
        dense_ms = record["ms_per_token"]
        result["records"].append(record)
        print(json.dumps(record), flush=True)
        for name in policy:
            sparse = {"case": one, "variant": name, "ms_per_token": timed(name)}
            result["records"].append(sparse)
            print(json.dumps(sparse), flush=True)
            for rate, number in itertools.product(acceptance, drafted):
                made: list[drafts.Drafting] = []

                def new(made=made, number=number) -> drafts.Drafting:
                    made.append(drafts.Drafting(number or None))
                    return made[-1]

                def by_chance(tokens, *_, rate=rate):
                    return torch.rand(tokens.shape, device=tokens.device) < rate

                by_definition, drafts.holds = drafts.holds, by_chance
                try:
                    ms = timed(name, exact=new)
                finally:
                    drafts.holds = by_definition
                record = {"case": one, "variant": f"exact, drafts by {name}", "acceptance": rate, "ms_per_token": ms}
                record |= {"times_faster_than_full": dense_ms / ms, "drafting": dataclasses.asdict(made[-1])}
                result["records"].append(record)
                print(json.dumps(record), flush=True)
        write(out, result)
        del cache, given, timed
        gc.collect()


def settle() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def write(out: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    app()
