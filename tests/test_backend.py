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
    found = python("""
        import json, sys, torch
        listed = "tidal" in torch._dynamo.list_backends()
        from models import *
        model = tiny_model(num_hidden_layers=3)
        step = torch.compile(model, backend="tidal", fullgraph=True, options={"policy": "tidal", "budget": 80})
        logits = decode_logits(step, prefilled(model, random_tokens(1, 20), 64), random_tokens(1, 2))
        eager = decode_logits(model, prefilled(model, random_tokens(1, 20), 64), random_tokens(1, 2))
        print(json.dumps([listed, (logits - eager).abs().max().item(), "tidal_compile" in sys.modules]))
    """)
    assert found[0] is True and found[1] < 1e-4 and found[2] is True


def test_a_second_process_hits_the_caches_for_the_same_policy_only(tmp_path):
    code = """
        import json, torch
        from models import *
        from torch._dynamo.utils import counters
        model = tiny_model(num_hidden_layers=4)
        step = torch.compile(model, backend="tidal", fullgraph=True, options={{"policy": "tidal", "budget": {budget}}})
        logits = decode_logits(step, prefilled(model, random_tokens(1, 90), 128), random_tokens(1, 2))
        print(json.dumps([dict(counters["aot_autograd"]), dict(counters["inductor"]), logits.sum().item()]))
    """
    runs = [python(code.format(budget=budget), TORCHINDUCTOR_CACHE_DIR=str(tmp_path)) for budget in (80, 80, 70)]
    hits = [aot.get("autograd_cache_hit", 0) for aot, _, _ in runs]
    misses = [aot.get("autograd_cache_miss", 0) for aot, _, _ in runs]
    assert (hits, misses) == ([0, 1, 0], [1, 0, 1])
    assert runs[0][2] == runs[1][2] != runs[2][2]


def test_256_steps_without_recompile_or_graph_break():
    model, slots = tiny_model(num_hidden_layers=3), 300
    step = torch.compile(model, backend="tidal", fullgraph=True, options={"policy": "tidal", "budget": 80})
    cache = prefilled(model, random_tokens(1, 20), slots)
    decode_logits(step, cache, random_tokens(1, 1))
    counters.clear()
    with torch.compiler.set_stance("fail_on_recompile"):
        decode_logits(step, cache, random_tokens(1, 256))
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
        ({"policy": "smollm2"}, tc.PolicyError, "smollm2: num_layers is 30, but the model has 3"),
        ({"policy": "tidal", "budget": 3}, tc.PolicyError, "budget 3 is smaller than sinks"),
        ({"policy": 7}, tc.PolicyError, "policy must be"),
        ({"strict": "yes"}, tc.TidalError, "'strict' must be true or false"),
        ({"inductor": {"no_such": 1}}, tc.TidalError, "no Inductor setting 'no_such'"),
    ],
)
def test_bad_options_raise_what_they_are(options, error, message):
    """Not wrapped in Dynamo's BackendCompilerFailed: a user can catch them."""
    model = tiny_model(num_hidden_layers=3)
    step = torch.compile(model, backend="tidal", options=options)
    with pytest.raises(error, match=message):
        decode_logits(step, prefilled(model, random_tokens(1, 5), 64), random_tokens(1, 1))
    if options.get("policy") != "smollm2" and options.get("budget") != 3:  # those two need the model
        with pytest.raises(error, match=message):
            tc.compile_config(**options)


def test_inductor_settings_reach_inductor():
    model = tiny_model(num_hidden_layers=1)
    settings = {"inductor": {"fallback_random": True, "size_asserts": False}}
    step = torch.compile(model, backend="tidal", options={"policy": "full", **settings})
    code = torch._inductor.utils.run_and_get_code(
        decode_logits, step, prefilled(model, random_tokens(1, 5), 64), random_tokens(1, 1)
    )[1]
    assert len(code) == 1 and "assert_size_stride(arg" not in code[0] and "torch.ops.tidal.full_attention" in code[0]


def test_the_generated_code_hands_the_cache_over_as_it_is():
    model = tiny_model(num_hidden_layers=3)
    step = torch.compile(model, backend="tidal", options={"policy": "tidal", "budget": 80})
    cache = prefilled(model, random_tokens(2, 5), 64)
    _, code = torch._inductor.utils.run_and_get_code(decode_logits, step, cache, random_tokens(2, 1))
    calls = [line for line in code[0].splitlines() if " = torch.ops.tidal." in line]
    assert len(calls) == 3
    for line in calls:
        inputs = line.partition("(")[2].split(",")
        assert all(name.strip().startswith(("arg", "reinterpret_tensor(arg")) for name in inputs[1:3]), line


@pytest.mark.uncompiled
def test_generate_equals_eager_generate(tiny):
    ids = random_tokens(2, 40)
    options = {"max_new_tokens": 20, "do_sample": False, "cache_implementation": "static"}
    eager = tiny.generate(ids, **options)
    for policy in ("full", tc.Policy.preset("tidal", 6, budget=100)):
        torch._dynamo.reset()
        assert torch.equal(tiny.generate(ids, compile_config=tc.compile_config(policy), **options), eager)


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
    cache = prefilled(model, random_tokens(1, 5), 64)
    assert decode_logits(step, cache, random_tokens(1, 1)).isfinite().all()
