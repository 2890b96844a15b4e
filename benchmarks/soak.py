"""Ten thousand tokens in one call of `tidal_compile.generate`: does it slow down, grow, compile or record anew?

`python benchmarks/soak.py --model random:smollm2-135m --policy tidal --exact` writes, for each thousand tokens, ms a
token and the memory of the device, and at the end what was compiled and recorded after the first thousand.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import tidal_compile as tc
from tidal_compile.models import load_model
from tidal_compile.passes.compat import inductor_counts
from tidal_compile.provenance import provenance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Meter:
    """A streamer that looks at the clock and the memory every so many tokens."""

    def __init__(self, every: int):
        self.every, self.count, self.rows, self.last = every, -1, [], time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Of the prompt first, and then of each token."""
        self.count += 1
        if self.count and self.count % self.every == 0:
            now = time.perf_counter()
            allocated = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
            made = {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}
            made["recorded"] = inductor_counts()["cudagraph_recorded_non_static_inputs"]
            ms = (now - self.last) / self.every * 1e3
            self.rows.append({"tokens": self.count, "ms_per_token": ms, "allocated_bytes": allocated, **made})
            self.last = now

    def end(self) -> None:
        """Nothing is left."""


def main(
    model: str = "random:smollm2-135m",
    policy: Annotated[list[str], typer.Option(help="Repeat.")] = ("full", "tidal"),
    exact: Annotated[bool, typer.Option(help="Also with the policy as a draft.")] = False,
    prompt: int = 2000,
    tokens: int = 10_000,
    batch: int = 1,
    every: int = 1000,
    out: Path = Path("out/soak.json"),
) -> None:
    """Decode, and write JSON."""
    net = load_model(model, DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    result: dict[str, Any] = {"kind": "soak", "model": model, "dtype": str(net.dtype).removeprefix("torch.")}
    result |= provenance(DEVICE) | {"prompt": prompt, "tokens": tokens, "batch": batch, "records": []}
    ids = torch.randint(1, net.config.vocab_size, (batch, prompt), device=DEVICE)
    for name in policy:
        for drafts in [False, True] if exact and name != "full" else [False]:
            meter = Meter(every)
            options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "streamer": meter, "exact": drafts}
            out_ids = tc.generate(net, ids, name, max_new_tokens=tokens, keep_cache=False, **options)
            assert out_ids.shape[1] == prompt + tokens
            record = {"policy": name, "exact": drafts, "by_thousand": meter.rows}
            first, last = meter.rows[0], meter.rows[-1]
            for key in ("graphs", "recorded", "allocated_bytes"):
                record[f"{key}_after_the_first"] = last[key] - first[key]
            result["records"].append(record)
            print(json.dumps({k: v for k, v in record.items() if k != "by_thousand"}), flush=True)
            print([round(row["ms_per_token"], 3) for row in meter.rows], flush=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
