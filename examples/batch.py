"""Decode several prompts of different lengths at once: padding on the left, one policy for all.

    python examples/batch.py
    python examples/batch.py --lengths 500 1000 4000 --policy tidal --budget 256

Padding is never selected, and `sinks` are the first real tokens of each sequence, so each row gets the answer that it
would get alone.
"""

import argparse

import torch

import tidal_compile as tc
from tidal_compile.evaluate.tasks import make_sample
from tidal_compile.models import load_model, load_tokenizer


def main(argv=None):
    parser = argparse.ArgumentParser(description="Pass-key prompts of several lengths in one batch under a policy.")
    parser.add_argument("--model", default="smollm2", help="smollm2, or a Hugging Face name or folder")
    parser.add_argument("--policy", help="file, preset or shipped name; default: smollm2 for that model, else tidal")
    parser.add_argument("--budget", type=int, help="tokens that a selection keeps; default: the policy's")
    parser.add_argument("--lengths", type=int, nargs="+", default=[500, 1000, 2000], help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=16)
    args = parser.parse_args(argv)
    policy = args.policy or ("smollm2" if args.model == "smollm2" else "tidal")
    budget = {} if args.budget is None else {"budget": args.budget}

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model, tokenizer = load_model(args.model, device, dtype), load_tokenizer(args.model)
    if tokenizer.pad_token is None:  # padding is masked out, so any token will do
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)

    samples = [
        make_sample("passkey", tokenizer, "", length, depth=0.5, seed=row) for row, length in enumerate(args.lengths)
    ]
    prompts = [[*sample.context, *sample.question] for sample in samples]
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(device)
    ids, mask = inputs.input_ids, inputs.attention_mask  # [B, n], n the longest prompt; the mask is 0 on padding
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=args.new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        cache_implementation="static",
        compile_config=tc.compile_config(policy, **budget),
    )  # [B, n + new_tokens]

    print(f"{'tokens':>6} {'padding':>7}  {'pass key':<8}   answer under {policy}")
    for sample, row, answer in zip(samples, mask, out[:, ids.shape[1] :], strict=True):
        live = row.sum().item()
        text = tokenizer.decode(answer, skip_special_tokens=True)
        print(f"{live:>6} {len(row) - live:>7}  {sample.answers[0]:<8}   {text!r}")


if __name__ == "__main__":
    main()
