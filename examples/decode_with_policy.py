"""Decode one prompt with generate(): first with dense attention, then under a policy.

    python examples/decode_with_policy.py
    python examples/decode_with_policy.py --prompt my_text.txt --new-tokens 100
    python examples/decode_with_policy.py --model Qwen/Qwen3-0.6B --policy tidal --budget 512

The default prompt hides a pass key in the middle of 2,000 tokens of filler, and asks for it. The first step under each
policy compiles, which takes about a minute on a CPU and is not timed.
"""

import argparse
import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch

import tidal_compile as tc
from tidal_compile.evaluate.tasks import make_sample
from tidal_compile.models import load_model, load_tokenizer

WARM_UP = 4  # calls of put(): the prompt, the prefill's token, and the steps that compile and record a CUDA graph


class Clock:
    """A streamer for generate(), which hands it each token: it notes the time."""

    def __init__(self):
        self.times = []

    def put(self, tokens):
        self.times.append(time.perf_counter())

    def end(self):
        pass

    def ms_per_token(self):
        return 1e3 * statistics.median(after - before for before, after in pairwise(self.times[WARM_UP:]))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Decode one prompt under `full` and under a policy.")
    parser.add_argument("--model", default="smollm2", help="smollm2, or a Hugging Face name or folder")
    parser.add_argument("--policy", help="file, preset or shipped name; default: smollm2 for that model, else tidal")
    parser.add_argument("--budget", type=int, help="tokens that a selection keeps; default: the policy's")
    parser.add_argument("--prompt", type=Path, help="a text file to go on from; default: a pass-key prompt")
    parser.add_argument("--context", type=int, default=2000, help="tokens of the pass-key prompt")
    parser.add_argument("--new-tokens", type=int, default=32)
    args = parser.parse_args(argv)
    policy = args.policy or ("smollm2" if args.model == "smollm2" else "tidal")
    budget = {} if args.budget is None else {"budget": args.budget}
    if args.new_tokens < WARM_UP + 2:
        parser.error(f"--new-tokens {args.new_tokens}: at least {WARM_UP + 2} are needed, to time one step")

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model, tokenizer = load_model(args.model, device, dtype), load_tokenizer(args.model)
    if args.prompt is None:
        sample = make_sample("passkey", tokenizer, "", args.context, depth=0.5, seed=0)
        prompt = [*sample.context, *sample.question]
        print(f"The pass key is {sample.answers[0]}.")
    else:
        prompt = tokenizer(args.prompt.read_text(encoding="utf-8")).input_ids
    ids = torch.tensor([prompt], device=device)  # [1, n]

    print(f"{'policy':<12} {'ms/token':>8}   text after {len(prompt)} tokens")
    for name in dict.fromkeys(("full", policy)):
        clock = Clock()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=args.new_tokens,
            min_new_tokens=args.new_tokens,  # so that both are timed over the same steps
            do_sample=False,
            cache_implementation="static",
            compile_config=tc.compile_config(name, **budget),
            streamer=clock,
        )  # [1, n + new_tokens]
        text = tokenizer.decode(out[0, len(prompt) :])
        print(f"{name:<12} {clock.ms_per_token():>8.1f}   {text!r}")


if __name__ == "__main__":
    main()
