"""Heads divided among ranks: the ops against the oracle of all heads, and whole models with gloo in processes."""

import math
import os
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from attention import DEVICE, IMPLEMENTATIONS, check_index, make_case, on_device
from models import decode_logits, prefilled, random_tokens, tiny_model
from recorder import Recorder
from test_ops import slack_of_turns
from tiers import sampled

import tidal_compile as tc
from tidal_compile.__main__ import main
from tidal_compile.kernels import reference
from tidal_compile.kernels.call import Call, Selection
from tidal_compile.kernels.methods.pages import Pages
from tidal_compile.passes.linears import join_linears
from tidal_compile.ranks import divide, use_local_weights
from tidal_compile.weights import quantise

HERE = Path(__file__).parent
CASES = {
    "plain": {"heads": (8, 4)},
    "one-head-a-rank": {"heads": (2, 2)},
    "padding": {"heads": (12, 4), "padding": 30, "batch": 3},
    "all-three": {"heads": (12, 2), "bias": True, "sink": True, "softcap": 2.0, "padding": 20},
    "nothing-live": {"heads": (4, 2), "length": 0},
    "long": {"slots": 6500, "length": 6100, "heads": (4, 2), "batch": 1, "head_dim": 64},
}


@pytest.mark.parametrize(
    ("name", "case"),
    sampled(
        [(name, case) for name in IMPLEMENTATIONS for case in CASES],
        [*(("reference", case) for case in CASES), ("triton", "plain"), ("triton", "all-three"), ("triton", "one-head-a-rank")],
    ),
)  # fmt: skip
@pytest.mark.parametrize("pool", ["sum", "max", "union"])
def test_ranks_choose_by_the_heads_of_all(name, case, pool):
    """What each rank says of its own heads, joined as the graph joins it, is what all heads together say."""
    from tidal_compile.kernels.triton import dense, select  # after conftest has chosen how kernels run

    impl, full_attention = {
        "reference": (reference, reference.full_attention), "triton": (select, dense.full_attention)
    }[name]  # fmt: skip
    args, extra = make_case(**CASES[case])
    q, k, v, length, mask, scale = args
    budget, sinks, recent, ratio = 24, 3, 5, 0.3 if pool == "max" else 0.0
    selection = Selection(budget, ratio, sinks, recent, "layer", pool)
    scores, valid = oracle.scores_of(q, k, int(length), mask, scale, extra["softcap"])
    said, ranks = [], 2
    for rank in range(ranks):
        own = [one.chunk(ranks, 1)[rank] for one in (q, k, v)]
        sink = None if extra["sink"] is None else extra["sink"].chunk(ranks)[rank]
        call = Call(
            *on_device((*own, length, mask, scale)), **on_device({"sink_logit": sink, "softcap": extra["softcap"]})
        )
        out, worth = impl.rank_and_attend(call, selection, rank, ranks)
        torch.testing.assert_close(out, full_attention(call), rtol=0, atol=0)
        again = impl.rank_by_scores(call, selection, rank, ranks)
        torch.testing.assert_close(worth[..., : int(length)], again[..., : int(length)], rtol=1e-5, atol=1e-7)
        said.append(worth)
    index = impl.choose_ranked(call, selection, sum(said) if pool == "sum" else torch.maximum(*said), 0)
    width = min(k.shape[2], max(budget, math.ceil(ratio * k.shape[2])))
    assert index.dtype == torch.int32 and index.shape == (q.shape[0], 1, width)
    importance = oracle.importance_of(scores, k.shape[1], "layer", extra["sink"], pool, sinks, recent)
    slack = 1e-5 if pool != "union" else slack_of_turns(scores)
    check_index(index, importance, valid, budget, ratio, sinks, recent, slack)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("pool", ["sum", "max", "union"])
@pytest.mark.parametrize("padding", [0, 30])
def test_ranks_choose_the_pages_of_all(name, pool, padding):
    """By bounds that two ranks have: what one process with all heads chooses. The newest page takes no turn."""
    from tidal_compile.kernels.triton import select

    q, k, v, length, mask, scale = make_case(heads=(8, 4), slots=200, length=190, padding=padding, batch=2)[0]
    pages, selection = Pages(page=8), Selection(41, 0.0, 3, 2, "layer", pool)
    k = k.nan_to_num(0)
    k[:, 0, int(length) - 6 : int(length) + 2] = 3 * q[:, 0]  # the newest page is the best one of the first head
    said, ranks = [], 2
    for rank in range(ranks):
        call = Call(*on_device((*(one.chunk(ranks, 1)[rank] for one in (q, k, v)), length, mask, scale)))
        bounds = pages.summarize(call.key)
        bounds[0][:, :, (int(length) - 1) // 8].zero_()  # a step brings it up to date
        weigh = pages.weigh if name == "reference" else pages.weigh_on_gpu
        said.append(weigh(call, selection, rank, ranks, *bounds))
        torch.testing.assert_close(bounds, pages.summarize(call.key), rtol=0, atol=0)
    joined = sum(said) if pool == "sum" else torch.maximum(*said)
    index = (reference if name == "reference" else select).choose_ranked(call, selection, joined, pages.page)
    expected = pages.choose(Call(*on_device((q, k, v, length, mask, scale))), selection)
    assert torch.equal(index, expected) and int(length) - 6 in index[0, 0]


def in_processes(ranks, *arguments):
    """Run a program in as many processes, which find each other: what they print, or the test fails."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        *arguments,
    ]
    here = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # one GPU is not enough, and gloo is what is to be tested
    here |= {"PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 8 query heads and 4 kv heads; and in a folder within, one whose linear layers but the last have biases."""
    made, heads = tmp_path_factory.mktemp("model"), {"num_attention_heads": 8, "num_key_value_heads": 4}
    tiny_model(num_hidden_layers=4, **heads).save_pretrained(made)
    model = tiny_model(num_hidden_layers=4, attention_bias=True, mlp_bias=True, **heads)
    for name, bias in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(bias, std=0.3)
    model.save_pretrained(made / "biased")
    return made


@pytest.mark.parametrize(("ranks", "every"), sampled([(2, 1), (4, 1), (2, 3), (4, 5)], [(2, 3), (4, 5)]))
def test_ranks_say_what_one_process_does(folder, ranks, every):
    """See `ranks.py`: logits under every share, pool, method and head map; generated tokens; ranks that disagree."""
    out = in_processes(ranks, str(HERE / "ranks.py"), str(folder), str(every))
    assert out.count("same tokens") == out.count("refusals") == out.count("same rounded") == ranks
    assert out.count("same logits") == ranks * math.ceil({2: 25, 4: 24}[ranks] / every)


@torch.no_grad()
def test_linear_layers_of_a_rank_are_joined(one_of_two_ranks):
    """Their weights are parts of what is divided: taken out of it in the graph, or before."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    model = divide(tiny_model(num_hidden_layers=2, device=DEVICE, **heads), 2)
    prompt, tokens = on_device((random_tokens(1, 60), random_tokens(1, 3)))
    for _ in range(2):
        found = []
        for linears in (True, False):
            recorder = Recorder(policy="full", linears=linears)
            step = torch.compile(model, backend=recorder, fullgraph=True, dynamic=False)
            found.append(decode_logits(step, prefilled(model, prompt, 80), tokens))
            counts = recorder.after[-1]
            assert (counts.get("linear.default", 0), counts.get("linear", 0)) == ((9, 0) if linears else (0, 15))
            torch._dynamo.reset()
        torch.testing.assert_close(*found)
        use_local_weights(model)


def test_weights_that_cannot_follow_a_plan_are_named(one_of_two_ranks):
    model = divide(tiny_model(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4), 2)
    with pytest.raises(tc.TidalError, match="pack_weights: the model is divided among ranks"):
        tc.pack_weights(model)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(64))
    with pytest.raises(tc.TidalError, match="'lm_head' with a bias is divided among ranks as 'colwise_gather_output'"):
        quantise(model, "int8")


@torch.no_grad()
def test_parts_taken_as_dynamo_of_torch_2_11_does(one_of_two_ranks):
    """By a function of its own instead of the method."""

    def prim_to_local(weight):
        return weight.to_local()

    counts = []

    def backend(gm, _):
        for node in gm.graph.find_nodes(op="call_method", target="to_local"):
            node.op, node.target = "call_function", prim_to_local
        gm.recompile()
        counts.append(join_linears(gm))
        return gm.forward

    model = divide(tiny_model(num_hidden_layers=2, device=DEVICE, num_attention_heads=8, num_key_value_heads=4), 2)
    prompt, tokens = on_device((random_tokens(1, 60), random_tokens(1, 3)))
    step = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    got = decode_logits(step, prefilled(model, prompt, 80), tokens)
    torch.testing.assert_close(got, decode_logits(model, prefilled(model, prompt, 80), tokens))
    assert counts == [15]


def test_the_command_line_refuses(tmp_path, capsys):
    """`run --tp` with a wrong policy, of ranks that can't divide three kv heads, and without torchrun."""
    command = ["-m", "tidal_compile", "run", "--tp", "--model", "random:smollm2-135m", "--baseline", "none"]
    command += ["--context", "64", "--new-tokens", "8", "--out", str(tmp_path), "--policy"]
    with pytest.raises(AssertionError, match="no such policy"):
        in_processes(3, *command, "no such policy")
    with pytest.raises(AssertionError, match="3 kv heads among 2 processes; valid here: 1, 3"):
        in_processes(2, *command, "full")
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tidal-compile", *command[2:], "full"])
        main()
    assert "--tp: start it by torchrun" in capsys.readouterr().err
