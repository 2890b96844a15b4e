"""Policies of every way to choose tokens that read as many bytes a step: a quarter of the cache, SmolLM2, 4,096 tokens.

`python benchmarks/equal_bytes.py` writes them to benchmarks/policies/equal-bytes/. Each is a preset or a shipped policy
with the largest budget at which its step reads no more than `SHARE` of the keys and values. There is none of what reads
more at any budget: `topk` scans half the cache, `omnikv` has too many dense layers. To compare them:

    tidal-compile eval perplexity --model smollm2 --length 4096 --seeds 2 $(printf -- '--policy %s ' \
        benchmarks/policies/equal-bytes/*.yaml)
"""

from pathlib import Path

from tidal_compile.explain import decode_calls
from tidal_compile.models import load_model
from tidal_compile.passes.plan import kv_share, make_plan
from tidal_compile.policy import Policy, resolve

FOLDER = Path(__file__).parent / "policies/equal-bytes"
LENGTH, SHARE = 4096, 0.25
NAMES = ("tidal", "smollm2", "smollm2-flat", "flat", "quest", "window", "lessismore", "kascade", "omnikv", "topk")


def at_budget(name: str, budget: int, num_layers: int) -> Policy:
    """A preset or a shipped policy with this budget in every selection."""
    if name == "lessismore":  # its share of recent tokens goes by its budget
        return Policy.preset(name, num_layers, budget=budget)
    return resolve(name, num_layers).with_budget(budget)


def main() -> None:
    """Write the policies, and print the budget and the share of each."""
    import torch

    calls, num_layers = decode_calls(load_model("smollm2", "meta", torch.float32))

    def share(policy: Policy) -> float:
        return kv_share(make_plan(list(calls), policy.roles), LENGTH)

    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        fitting = [budget for budget in range(16, LENGTH, 16) if share(at_budget(name, budget, num_layers)) <= SHARE]
        if not fitting:
            print(f"{name}: none; at a budget of 16 it reads {share(at_budget(name, 16, num_layers)):.0%}")
            continue
        policy = at_budget(name, fitting[-1], num_layers)
        policy.save(FOLDER / f"{name}.yaml")
        print(f"{name}: budget {fitting[-1]}, reads {share(policy):.1%}")


if __name__ == "__main__":
    main()
