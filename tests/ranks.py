"""A program for each rank of a tensor-parallel model, which also holds all of it: what both say must be the same."""

import contextlib
import itertools
import os
import sys
from unittest import mock

import torch
from models import decode_logits, prefilled
from torch import distributed
from transformers import AutoModelForCausalLM, StaticCache
from transformers.distributed import DistributedConfig

import tidal_compile as tc
from tidal_compile.ranks import use_local_weights
from tidal_compile.weights import PackedLinear, quantise

SMALL = {"budget": 12, "sinks": 2, "recent": 3}
LENGTH, SLOTS = 60, 80
BY_ROW = ("o_proj", "down_proj")  # linear layers of which each rank has some of the columns


def policies(ranks):
    """Every share, pool, method and head map."""
    kinds = [{"share": share, "pool": pool} for share in ("kv_head", "layer") for pool in ("sum", "max", "union")]
    kinds += [{"share": "query_head"}]
    for kind, output in itertools.product(kinds, ("full", "sparse")):
        yield {"0": "full", "1": {"role": "select", "output": output, **kind}, "2-3": "reuse"}
    yield {"0": "full", "1": {"role": "select", "by": "pages", "page": 4}, "2-3": "reuse"}
    yield {"0": "full", "1": {"role": "select", "by": "pages", "page": 4, "keep": 2.0}, "2-3": "reuse"}
    for pool in ("sum", "max", "union"):
        select = {"role": "select", "by": "pages", "page": 4, "share": "layer", "pool": pool}
        yield {"0": "full", "1": select, "2-3": "reuse"}
    yield {"0": "full", "1": {"role": "select", "by": "window", "share": "layer"}, "2-3": "reuse"}
    yield {"0": "full", "1-3": {"role": "select", "by": "lsh", "k": 2, "l": 20}}
    here = 4 // ranks
    maps = [[3, 2, 1, 0], [2, 2, 0, 3], [0, 0, 0, 0]]
    if here > 1:
        maps.append([1, 0, 3, 2])  # within each rank
    for heads in maps:
        yield {"0": "full", "1": "select", "2": {"role": "reuse", "heads": heads}, "3": "reuse"}


def uncompiled():
    """The rewritten graph runs as it is."""
    return mock.patch("torch._inductor.compile_fx.compile_fx", lambda gm, *_, **__: gm.forward)


def difference(whole, shared):
    """How far logits of ranks are from those of one process, as a share of the largest, which is about 7 here.

    In float32, those of one process are 1.9e-5 from float64's on some processors, those of 4 ranks 1.2e-5.
    """
    return (whole - shared).abs().max() / whole.abs().max()


@torch.no_grad()
def same_logits(whole, shared, every):
    """A decode step by step after a prompt, padded or not, under each `every`-th policy.

    The first three with weights as transformers divides them, the others as `--tp` does.
    """
    torch.manual_seed(0)
    ids = torch.randint(3, 128, (2, LENGTH + 3))
    mask = torch.ones(2, SLOTS, dtype=torch.bool)
    mask[0, :7] = False
    for number, layers in enumerate(policies(distributed.get_world_size())):
        if number % every:
            continue
        if number == 3 * every:
            use_local_weights(shared)
        compiles = layers.get("1") == {"role": "select", "output": "full", "share": "layer", "pool": "sum"}
        torch._dynamo.reset()
        policy = tc.Policy.from_dict({"num_layers": 4, "layers": layers, "defaults": SMALL})
        found = []
        for model in (whole, shared):
            cache = StaticCache(config=model.config, max_cache_len=SLOTS)
            padding = {"attention_mask": mask} if number % 2 else {}
            model(ids[:, :LENGTH], past_key_values=cache, **padding)
            step = torch.compile(model, backend="tidal", fullgraph=True, options={"policy": policy})
            masks = [mask] * 3 if number % 2 else None
            with contextlib.nullcontext() if compiles else uncompiled():
                found.append(decode_logits(step, cache, ids[:, LENGTH:], masks))
        error = difference(*found)
        assert error < 1e-5, (layers, error)
        print("same logits", layers, float(error))


def same_tokens(whole, shared):
    """`generate` under a policy, densely by its drafts, and sampled: each rank has another seed."""
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(1))
    policy = {"num_layers": 4, "layers": {"0": "full", "1": {"role": "select", "share": "layer"}, "2-3": "reuse"}}
    policy["defaults"] = SMALL
    for more in ({}, {"exact": True}):
        options = {"max_new_tokens": 12, "do_sample": False, **more}
        assert torch.equal(tc.generate(whole, ids, policy, **options), tc.generate(shared, ids, policy, **options))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    padded = {"attention_mask": mask, "pad_token_id": 0, "return_dict_in_generate": True}
    for more in (padded, {"assistant_model": whole, "one": True}, {"kind": tc.Fp8Cache}, {"kind": tc.HostCache}):
        said, given = [], {name: value for name, value in more.items() if name not in ("one", "kind")}
        for model in (whole, shared):
            torch._dynamo.reset()
            layers = {"layers": [2, 3]} if more.get("kind") is tc.HostCache else {}
            cache = {"past_key_values": more["kind"](model.config, SLOTS, **layers)} if "kind" in more else {}
            some = ids[1:] if "one" in more else ids
            out = tc.generate(model, some, policy, max_new_tokens=12, do_sample=False, **given, **cache)
            said.append(getattr(out, "sequences", out))
        assert torch.equal(*said), more
    for seconds in (0.05, 0.06, 0.07, 0.08):  # by the clock of the first
        tc.generate(shared, ids, policy, max_new_tokens=200, max_time=seconds, do_sample=False)
    torch.manual_seed(distributed.get_rank())
    for more in ({}, {"exact": True}):
        said = tc.generate(shared, ids, policy, max_new_tokens=12, do_sample=True, **more)
        everywhere = [torch.empty_like(said) for _ in range(distributed.get_world_size())]
        distributed.all_gather(everywhere, said.contiguous())
        assert all(torch.equal(one, said) for one in everywhere)
    print("same tokens")


@torch.no_grad()
def same_rounded(folder, ranks):
    """Weights in int8 that each rank rounds, beside one process that rounds as many pieces; in int4, what each holds."""
    whole, shared = load(folder, ranks, torch.float32)
    quantise(shared, "int8")
    for name, layer in whole.named_modules():
        if isinstance(layer, torch.nn.Linear):
            pieces = layer.weight.unflatten(1, (ranks if name.endswith(BY_ROW) else 1, -1))
            scale = pieces.abs().amax(-1, keepdim=True) / 127
            layer.weight.copy_(((pieces / scale).round() * scale).flatten(1))
    ids = torch.randint(3, 128, (1, LENGTH + 3), generator=torch.Generator().manual_seed(2))
    found = []
    for model in (whole, shared):
        torch._dynamo.reset()
        step = torch.compile(model, backend="tidal", fullgraph=True, options={"policy": "full"})
        found.append(decode_logits(step, prefilled(model, ids[:, :LENGTH], SLOTS), ids[:, LENGTH:]))
    error = difference(*found)
    assert error < 1e-5, error
    whole, shared = (quantise(model, "int4-32") for model in load(folder, ranks, torch.bfloat16))
    checked = set()
    for name, layer in shared.named_modules():
        if isinstance(layer, PackedLinear):
            of_ranks = whole.get_submodule(name).weight.chunk(ranks, 1 if name.endswith(BY_ROW) else 0)
            assert torch.equal(layer.weight, of_ranks[distributed.get_rank()]), name
            checked.add(name.rpartition(".")[2])
    by_row = {"o_proj"} if ranks == 2 else set()  # 32 divides no rank's columns else
    assert checked == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", *by_row}, checked
    print("same rounded")


def load(folder, ranks, dtype):
    """A model, and this rank's part of it."""
    make = AutoModelForCausalLM.from_pretrained
    return make(folder, dtype=dtype), make(folder, dtype=dtype, distributed_config=DistributedConfig(tp_size=ranks))


def refusals(shared):
    """Ranks that compile different steps are told so, all of them."""
    rank = distributed.get_rank()
    for problem, kinds in (("policies", StaticCache), ("caches", StaticCache), ("caches", tc.Fp8Cache)):
        torch._dynamo.reset()
        slots = 64 if problem == "policies" or kinds is tc.Fp8Cache or rank == 0 else 96
        budget = 80 if problem == "caches" or rank == 0 else 90
        cache = (kinds if rank == 0 else StaticCache)(shared.config, max_cache_len=slots)
        ids = torch.arange(3, 40)[None]
        step = torch.compile(shared, backend="tidal", fullgraph=True, options={"policy": "tidal", "budget": budget})
        with torch.no_grad():
            shared(ids, past_key_values=cache)
            try:
                step(input_ids=ids[:, :1].clone(), past_key_values=cache)
            except tc.TidalError as error:
                assert f"the ranks' {problem} differ" in str(error), error
            else:
                raise AssertionError(f"{problem} that differ were taken")
    torch._dynamo.reset()
    policy = "tidal" if rank == 0 else {"num_layers": 3, "layers": {"0-2": "full"}}
    step = torch.compile(shared, backend="tidal", fullgraph=True, options={"policy": policy})
    try:
        with torch.no_grad():
            step(input_ids=ids[:, :1].clone(), past_key_values=cache)
    except tc.TidalError as error:
        assert ("rank 1: " in str(error)) == (rank == 0) and "num_layers" in str(error), error
    else:
        raise AssertionError("a policy for another model was taken on one rank")
    print("refusals")


def main(folder, every):
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    whole, shared = load(folder, ranks, torch.float32)
    same_logits(whole, shared, every)
    with uncompiled():
        same_tokens(whole, shared)
        refusals(shared)
        same_rounded(f"{folder}/biased", ranks)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
