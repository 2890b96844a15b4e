"""Write the decode loop yourself: a static cache, a dense prefill, and a compiled step.

    python examples/own_loop.py
    python examples/own_loop.py --model Qwen/Qwen3-0.6B --policy tidal --budget 512

The compiled step is an ordinary torch.compile of the model. Under `full` it gives the tokens that eager gives; under
a sparse policy it may differ where the policy leaves out what mattered.
"""

import argparse

import torch
from transformers import StaticCache

from tidal_compile.evaluate.tasks import make_sample
from tidal_compile.models import load_model, load_tokenizer, with_cache


@torch.no_grad()
def decode(model, step, prompt, new_tokens):
    """Greedy tokens [new_tokens] after prompt [1, n]: the model prefills, `step` decodes."""
    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + new_tokens)
    # The prefill fills n slots of the cache, [1, kv heads, n + new_tokens, head size] in each layer
    logits = model(input_ids=prompt, logits_to_keep=1, **with_cache(model, cache)).logits  # [1, 1, vocab]
    token = logits.argmax(-1)  # [1, 1]
    tokens = [token]
    while len(tokens) < new_tokens:
        torch.compiler.cudagraph_mark_step_begin()  # the last step's logits may be overwritten
        logits = step(input_ids=token, **with_cache(model, cache)).logits  # [1, 1, vocab]
        token = logits.argmax(-1)
        tokens.append(token)
    return torch.cat(tokens, 1)[0]


def main(argv=None):
    parser = argparse.ArgumentParser(description="A greedy decode loop with a compiled step, compared with eager.")
    parser.add_argument("--model", default="smollm2", help="smollm2, or a Hugging Face name or folder")
    parser.add_argument("--policy", help="file, preset or shipped name; default: smollm2 for that model, else tidal")
    parser.add_argument("--budget", type=int, help="tokens that a selection keeps; default: the policy's")
    parser.add_argument("--context", type=int, default=2000, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=16)
    args = parser.parse_args(argv)
    policy = args.policy or ("smollm2" if args.model == "smollm2" else "tidal")
    budget = {} if args.budget is None else {"budget": args.budget}

    # In float32 the two ways to compute the same thing round alike closely enough to choose the same tokens
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(args.model, device), load_tokenizer(args.model)
    sample = make_sample("passkey", tokenizer, "", args.context, depth=0.5, seed=0)
    prompt = torch.tensor([[*sample.context, *sample.question]], device=device)  # [1, n]

    eager = decode(model, model, prompt, args.new_tokens)
    print(f"{'eager':<12} {'':>18}   {tokenizer.decode(eager)!r}")
    for name in dict.fromkeys(("full", policy)):
        step = torch.compile(model, backend="tidal", fullgraph=True, options={"policy": name, **budget})
        tokens = decode(model, step, prompt, args.new_tokens)
        same = f"{(tokens == eager).sum()} of {len(eager)} as eager"
        print(f"{name:<12} {same:>18}   {tokenizer.decode(tokens)!r}")


if __name__ == "__main__":
    main()
