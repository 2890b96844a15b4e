"""`tidal-compile bench`: latency beside the baselines."""

import contextlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import report
from ..provenance import provenance
from ..shapes import FORMS
from .common import (
    CacheKind,
    CacheOption,
    DeviceOption,
    DType,
    DTypeOption,
    JsonOption,
    ResultsOption,
    Share,
    add_stage,
    check_positions,
    file_name,
    make_folder,
    out,
    show_progress,
    where,
)  # fmt: skip

app = typer.Typer(help="Measure latency beside the baselines; every output is checked first.", no_args_is_help=True)


class StepBaseline(StrEnum):
    """What `bench decode` compares with: `inductor` is its default mode, `flash` dense at its best (see its help)."""

    eager = "eager"
    inductor = "inductor"
    reduce_overhead = "reduce-overhead"
    flash = "flash"
    tensorrt = "tensorrt"
    none = "none"


ContextsOption = Annotated[list[int], typer.Option("--context", min=2, help="Live tokens; repeat for several.")]
BatchesOption = Annotated[list[int], typer.Option("--batch", min=1, help="Sequences; repeat for several.")]
NameOption = Annotated[str, typer.Option(help="Part of the result's file name.")]
LayersOption = Annotated[int | None, typer.Option(min=1, help="Another depth, for random weights.")]


@app.command("decode")
def bench_decode(
    model: Annotated[str, typer.Option(help=f"Weights don't matter: {FORMS}.")] = "random:llama-3.1-8b",
    policy: Annotated[list[str], typer.Option(help="Preset, shipped name or file; repeat.")] = ("full", "tidal"),
    baseline: Annotated[
        list[StepBaseline],
        typer.Option(
            help="Repeat; `none` for none. `flash`: reduce-overhead, SDPA flash on the live cache without a mask. "
            "`tensorrt`: `full`, with its dense parts as TensorRT engines."
        ),
    ] = (StepBaseline.reduce_overhead, StepBaseline.flash),
    context: ContextsOption = (100_000,),
    batch: BatchesOption = (1,),
    budget: Annotated[list[int] | None, typer.Option(min=1, help="Budgets of each sparse policy; repeat.")] = None,
    steps: Annotated[int, typer.Option(min=4, help="Steps to time.")] = 50,
    generate: Annotated[int, typer.Option(help="Tokens through model.generate and ours, too; 0: none.")] = 0,
    cache: CacheOption = CacheKind.auto,
    layers: LayersOption = None,
    device: DeviceOption = "auto",
    dtype: DTypeOption = DType.auto,
    name: NameOption = "",
    results: ResultsOption = Path("out"),
    as_json: JsonOption = False,
) -> None:
    """Time decode steps under policies beside their baselines: ms, GB/s and the fraction of the policy's byte floor.

    The floor is what a step must read, weights and the policy's share of the KV cache, at the rate of a device copy.
    """
    device, number = where(device, dtype)
    baselines = [kind.value for kind in baseline if kind != StepBaseline.none]
    about = {"kind": "decode", "model": model, "layers": layers, "cache": cache.value}
    with _results(about, results, f"{Path(model).name}-{name}", device, as_json) as keep:
        _measure_decode(
            keep, model, policy, budget or [], baselines, context, batch, steps, generate, layers, device, number,
            cache.value,
        )  # fmt: skip


@app.command("kernels")
def bench_kernels(
    context: ContextsOption = (10_000, 32_000, 100_000),
    batch: BatchesOption = (1,),
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[list[int], typer.Option(min=1, help="Key/value heads; repeat.")] = (8, 32),
    head_dim: Annotated[int, typer.Option(min=8)] = 128,
    budget: Annotated[list[int], typer.Option(min=1, help="Tokens of a selection; repeat.")] = (1024,),
    share: Annotated[list[Share], typer.Option(help="Who shares a token set; repeat.")] = (Share.kv_head,),
    device: DeviceOption = "auto",
    dtype: DTypeOption = DType.auto,
    name: NameOption = "",
    results: ResultsOption = Path("out"),
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Time the attention ops beside SDPA, torch.topk and, if installed, FlashInfer: us, GB/s, share of the copy rate.

    Contexts, batches and kv heads are combined at the first budget and share; the others run at the last context.
    """
    from ..bench.kernels import sizes

    device, number = where(device, dtype)
    cases = sizes(context, batch, heads, kv_heads, head_dim, budget, [way.value for way in share])
    with _results({"kind": "kernels"}, results, name, device, as_json) as keep:
        _measure_kernels(keep, cases, device, number)


@app.command("figures")
def bench_figures(
    model: Annotated[str, typer.Option(help="The shape to decode with.")] = "random:llama-2-7b",
    context: ContextsOption = (10_000, 32_000, 100_000),
    budget: Annotated[list[int], typer.Option(min=1, help="Repeat.")] = (32, 128, 512, 1024, 4096),
    steps: Annotated[int, typer.Option(min=4, help="Steps to time.")] = 30,
    layers: LayersOption = None,
    device: DeviceOption = "auto",
    dtype: DTypeOption = DType.auto,
    results: ResultsOption = Path("out"),
    as_json: JsonOption = False,
) -> None:
    """Draw the TidalDecode paper's Figures 1 (latency of a step) and 2 (of attention), with Quest: JSON and PNG.

    Give a model whose query heads each have a kv head, as in the paper, since Quest chooses for each query head.
    """
    from ..bench import figures
    from ..bench.kernels import sizes
    from ..models import load_config

    device, number = where(device, dtype)
    report.need_matplotlib()
    config = load_config(model).get_text_config(decoder=True)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    cases = [size for each in budget for size in sizes(context, [1], heads, [kv_heads], head_dim, [each], ["kv_head"])]
    about = {"kind": "figures", "model": model}
    with _results(about, results, Path(model).name, device, as_json) as keep:
        _measure_decode(
            keep, model, ["full", "tidal", "quest"], budget, [], context, [1], steps, 0, layers, device, number
        )
        _measure_kernels(keep, cases, device, number)
    for number, draw in enumerate((figures.draw_latency, figures.draw_attention), 1):
        draw(keep.result, keep.path.with_name(f"{keep.path.stem}-{number}.png"))


def _measure_decode(
    keep: "Kept", model: str, policies: list[str], budgets: list[int], baselines: list[str], contexts: list[int],
    batches: list[int], steps: int, generate: int, layers: int | None, device: str, number: Any, kind: str = "auto",
) -> None:  # fmt: skip
    """Keep the records of `bench decode`, with progress."""
    import torch
    from transformers.utils import logging as hf_logging

    from ..backend import Options
    from ..bench import decode
    from ..bench.timing import copy_rate
    from ..models import load_config, load_model

    hf_logging.disable_progress_bar()
    asked = [Options.parse({"policy": policy}) for policy in policies]
    place = torch.device(device)
    extra = decode.WARM_UP + max(steps, generate + 1)
    shape = decode.read_shape(load_model(model, "meta", number, layers), number, kind)
    cases = decode.cases_of(shape, baselines, asked, budgets)
    config = load_config(model)
    for context in contexts:
        check_positions(config, model, context, "warm-up and --steps", extra)
        for batch in batches:
            decode.need_memory(shape, cases, batch, context + extra, decode.free_memory(place))
    with show_progress() as progress:
        done = add_stage(progress, f"load {model}", 1)
        net, rate = load_model(model, device, number, layers), copy_rate(place)
        keep.result |= {"copy_bytes_per_s": rate, "dtype": str(number).removeprefix("torch."), "decode": []}
        done()
        # What we compile reads the live part of any cache; what others do reads all of it, and needs one that fits
        shared = not baselines and decode.keeps_everything(net)
        for batch, group in itertools.product(batches, [contexts] if shared else [[context] for context in contexts]):
            advance = add_stage(progress, f"batch {batch}, {', '.join(map(str, group))} tokens", len(cases))
            cache, saved = decode.make_cache(net, batch, max(group) - 1, max(group) + extra, kind)
            token = torch.randint(net.config.vocab_size, (batch, 1), device=place)
            lengths = [context - 1 for context in group]
            for case in cases:
                measured = list(decode.run_case(net, shape, case, cache, lengths, token, steps, rate, saved))[::-1]
                for record in measured:
                    record["slots"] = max(group) + extra
                    if generate and case.name not in ("inductor", "flash"):
                        length = record["context"] - 1
                        given = net, case, cache, length, token, generate, saved
                        record["generate_ms"] = decode.generate_ms(*given)
                        if case.policy is not None:
                            record["own_generate_ms"] = decode.generate_ms(*given, own=True)
                keep.add("decode", measured)
                advance()
            del cache, saved


def _measure_kernels(keep: "Kept", cases: list, device: str, number: Any) -> None:
    """Keep the records of `bench kernels`, with progress."""
    import torch

    from ..bench import decode, kernels
    from ..bench.timing import copy_rate

    place = torch.device(device)
    for size in cases:
        kernels.need_memory(size, place, decode.free_memory(place))
    rate = copy_rate(place)
    keep.result |= {"copy_bytes_per_s": rate, "dtype": str(number).removeprefix("torch."), "kernels": []}
    with show_progress() as progress:
        advance = add_stage(progress, "kernels", len(cases))
        for size in cases:
            keep.add("kernels", kernels.run_size(size, place, number, rate))
            advance()


@dataclass
class Kept:
    """A result as it grows, written to its file with every record, so that an interrupt loses nothing."""

    result: dict[str, Any]
    path: Path

    def add(self, key: str, records: list[dict[str, Any]]) -> None:
        """Add records, and write."""
        self.result[key] += records
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.result, indent=1) + "\n")
        part.replace(self.path)


@contextlib.contextmanager
def _results(about: dict[str, Any], folder: Path, name: str, device: str, as_json: bool) -> Iterator[Kept]:
    """A result with its provenance, to be filled, then printed. An interrupt keeps and prints what was measured."""
    make_folder(folder)
    made_by = provenance(device)
    kept = Kept({**about}, folder / f"{file_name(about['kind'], name, made_by['device'])}.json")
    interrupted = False
    try:
        kept.result |= {"interrupted": True, **made_by}
        yield kept
    except KeyboardInterrupt:
        interrupted = True
    else:
        del kept.result["interrupted"]
    if not interrupted or kept.path.exists():
        kept.write()
        _print(kept, as_json)
    if interrupted:
        raise typer.Exit(130)


def _print(kept: Kept, as_json: bool) -> None:
    from ..bench import markdown

    if as_json:
        print(json.dumps(kept.result))
        return
    for key, columns, rows in (
        ("decode", markdown.DECODE_COLUMNS, markdown.decode_rows),
        ("kernels", markdown.KERNEL_COLUMNS, markdown.kernel_rows),
    ):
        if key in kept.result:
            print(markdown.markdown(columns, rows(kept.result)))
    out.print(markdown.about(kept.result), markup=False, highlight=False, soft_wrap=True)
    out.print(f"wrote {kept.path}", markup=False, highlight=False, soft_wrap=True)
