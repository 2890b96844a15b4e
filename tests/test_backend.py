"""The backend as a user meets it: found by name, its options, recompiles, Inductor's caches, generate()."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from models import decode_logits, prefilled, random_tokens, tiny_model
from torch._dynamo.utils import counters

import tidal_compile as tc


def python(code, **environment):
    """Run code in a process of its own; returns what it printed last, as JSON."""
    preamble = "import sys; sys.path.insert(0, 'tests')\n"
    done = subprocess.run(
        [sys.executable, "-c", preamble + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_found_by_name_without_an_import():
    """Up to Inductor, which would start anew in this process."""
    found = python("""
        import json, sys, torch, torch._inductor.compile_fx
        torch._inductor.compile_fx.compile_fx = lambda gm, *_, **__: compiled.append(gm) or gm.forward
        listed, compiled = "tidal" in torch._dynamo.list_backends(), []
        from models import *
        model = tiny_model(num_hidden_layers=1)
        step = torch.compile(model, backend="tidal", fullgraph=True, options={"policy": "full"})
        logits = decode_logits(step, prefilled(model, random_tokens(1, 20), 64), random_tokens(1, 2))
        eager = decode_logits(model, prefilled(model, random_tokens(1, 20), 64), random_tokens(1, 2))
        apart, ops = (logits - eager).abs().max().item(), [gm.code.count("torch.ops.tidal.") for gm in compiled]
        print(json.dumps([listed, apart, "tidal_compile" in sys.modules, ops]))
    """)
    assert found[0] is True and found[1] < 1e-4 and found[2:] == [True, [1]]


@pytest.mark.slow
def test_a_second_process_hits_the_caches_for_the_same_policy_only(tmp_path):
    code = """
        import json, torch
        from models import *
        from torch._dynamo.utils import counters
        model, found = tiny_model(num_hidden_layers=2), []
        for budget in {budgets}:
            defaults = dict(budget=budget, sinks=2, recent=8)
            layers = {{"0": {{"role": "select", "by": "pages", "page": 8}}, "1": "reuse"}}  # with what it keeps
            policy = dict(num_layers=2, layers=layers, defaults=defaults)
            counters.clear()
            step = torch.compile(model, backend="tidal", fullgraph=True, options=dict(policy=policy))
            logits = decode_logits(step, prefilled(model, random_tokens(1, 90), 128), random_tokens(1, 2))
            found.append([dict(counters["aot_autograd"]), logits.sum().item()])
        print(json.dumps(found))
    """
    first, second = (
        python(code.format(budgets=budgets), TORCHINDUCTOR_CACHE_DIR=str(tmp_path)) for budgets in ((80,), (80, 70))
    )
    hits = [aot.get("autograd_cache_hit", 0) for aot, _ in (*first, *second)]
    misses = [aot.get("autograd_cache_miss", 0) for aot, _ in (*first, *second)]
    assert (hits, misses) == ([0, 1, 0], [1, 0, 1])
    assert first[0][1] == second[0][1] != second[1][1]


def test_256_steps_of_the_code_that_was_asked_for():
    """No recompile and no graph break; Inductor gets its settings, and hands the cache over as it is."""
    model, slots, tokens = tiny_model(num_hidden_layers=2), 300, random_tokens(2, 256)
    settings = {"inductor": {"fallback_random": True, "size_asserts": False}}
    policy = {"num_layers": 2, "layers": {"0": "select", "1": "reuse"}, "defaults": {"budget": 80}}
    options = {"policy": policy, **settings}
    step = torch.compile(model, backend="tidal", fullgraph=True, options=options)
    cache = prefilled(model, random_tokens(2, 20), slots)
    _, (code,) = torch._inductor.utils.run_and_get_code(decode_logits, step, cache, tokens[:, :1])
    calls = [line for line in code.splitlines() if " = torch.ops.tidal." in line]
    assert len(calls) == 2 and "assert_size_stride(arg" not in code
    for line in calls:
        inputs = line.partition("(")[2].split(",")
        assert all(name.strip().startswith(("arg", "reinterpret_tensor(arg")) for name in inputs[1:3]), line
    counters.clear()
    with torch.compiler.set_stance("fail_on_recompile"):
        decode_logits(step, cache, tokens)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 0
    assert int(cache.layers[0].cumulative_length) == 277


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"polcy": "full"}, tc.TidalError, "unknown option 'polcy'.*valid options are: policy, strict.*budget"),
        ({"policy": "tidla"}, tc.PolicyError, "unknown policy 'tidla'.*presets are: full, tidal.*smollm2"),
        ({"policy": "no/such.yaml"}, tc.PolicyError, "no/such.yaml: can't read the policy file"),
        (
            {"policy": {"num_layers": 3, "layers": {"0-2": "dense"}}},
            tc.PolicyError,
            "layers.0-2.role.*'full', 'select' or 'reuse'",
        ),
        ({"policy": "smollm2"}, tc.PolicyError, "smollm2: num_layers is 30, but the model has 1"),
        ({"policy": "tidal", "budget": 3}, tc.PolicyError, "budget 3 is smaller than sinks"),
        ({"policy": 7}, tc.PolicyError, "policy must be"),
        ({"strict": "yes"}, tc.TidalError, "'strict' must be true or false"),
        ({"inductor": {"no_such": 1}}, tc.TidalError, "no Inductor setting 'no_such'"),
    ],
)
def test_bad_options_raise_what_they_are(options, error, message):
    """Not wrapped in Dynamo's BackendCompilerFailed: a user can catch them."""
    model = tiny_model(num_hidden_layers=1)
    step = torch.compile(model, backend="tidal", options=options)
    with pytest.raises(error, match=message):
        decode_logits(step, prefilled(model, random_tokens(1, 5), 64), random_tokens(1, 1))
    if options.get("policy") != "smollm2" and options.get("budget") != 3:  # those two need the model
        with pytest.raises(error, match=message):
            tc.compile_config(**options)


@pytest.mark.uncompiled
def test_generate_equals_eager_generate(tiny):
    ids = random_tokens(2, 40)
    options = {"max_new_tokens": 20, "do_sample": False, "cache_implementation": "static"}
    config = tc.compile_config(tc.Policy.preset("tidal", 4, budget=100))
    assert torch.equal(tiny.generate(ids, compile_config=config, **options), tiny.generate(ids, **options))


@pytest.mark.uncompiled
def test_generate_again_with_longer_prompts():
    """A second and third prompt length: one more graph for any length, not one a length."""
    model = tiny_model(num_hidden_layers=3)
    config = tc.compile_config("tidal", budget=24, sinks=2, recent=4)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "compile_config": config}
    counters.clear()
    for length in (40, 60, 90, 130, 75):
        model.generate(random_tokens(1, length), **options)
    assert counters["stats"]["unique_graphs"] <= 2


def test_compile_config_takes_every_form_of_policy(tmp_path):
    policy = tc.Policy.preset("tidal", 6, budget=100)
    file = tmp_path / "p.yaml"
    file.write_text(policy.to_yaml())
    for form in (policy, policy.to_dict(), file, str(file)):
        config = tc.compile_config(form)
        assert config.backend == "tidal" and config.mode is None and config.fullgraph
        json.dumps(config.to_dict())
        assert config.to_dict() == tc.compile_config(form).to_dict()


def test_reduce_overhead_mode_is_accepted():
    """`mode` excludes `options`, so it runs the default policy."""
    model = tiny_model(num_hidden_layers=1)
    step = torch.compile(model, backend="tidal", mode="reduce-overhead")
    cache = prefilled(model, random_tokens(2, 5), 300)  # shapes of the steps above, whose kernels Inductor has
    assert decode_logits(step, cache, random_tokens(2, 1)).isfinite().all()
