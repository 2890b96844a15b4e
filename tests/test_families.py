"""Every family of models that people run: what is matched, and that the answers are right. No Inductor here.

`full` is compared with the model as it is, a sparse policy with an oracle that has its own attention.
"""

import pytest
import torch
from families import FAMILIES, PAGE, with_table
from models import decode_logits, family_model, prefilled, random_tokens
from oracle import OracleModel, roles_of
from recorder import Recorder

import tidal_compile as tc
from tidal_compile import shapes
from tidal_compile.models import load_model

PROMPT, STEPS, SLOTS = 40, 4, 48
CASES = [(name, form) for name, family in FAMILIES.items() for form in family.implementations]
SPARSE = [case for case in CASES if FAMILIES[case[0]].sites]


def decode(model, recorder, batch=2):
    """Prefill, then a few steps: logits `[B, T, vocab]` of the model, or of what the recorder made of it."""
    step = model if recorder is None else torch.compile(model, backend=recorder, fullgraph=True)
    cache = prefilled(model, random_tokens(batch, PROMPT), SLOTS)
    return decode_logits(step, cache, random_tokens(batch, STEPS, seed=2))


@pytest.mark.parametrize(("name", "form"), CASES)
def test_full_equals_eager(name, form):
    family, model = FAMILIES[name], family_model(name, attn_implementation=form)
    eager = decode(model, None)
    if not family.sites:
        with pytest.raises(tc.UnsupportedModelError, match=family.reason.replace("(", r"\(").replace(")", r"\)")):
            decode(model, Recorder(policy="full"))
        return
    recorder = Recorder(policy="full")
    torch.testing.assert_close(decode(model, recorder), eager, atol=2e-4, rtol=2e-4)
    decisions = recorder.plans[0].decisions
    assert [decision.layer for decision in decisions if decision.role] == family.layers
    assert [decision.reason for decision in decisions if not decision.role] == [family.reason] * family.left
    assert len(recorder.graphs) == 1  # for all steps


@pytest.mark.parametrize(("name", "form"), SPARSE)
def test_sparse_equals_the_oracle(name, form):
    family, model = FAMILIES[name], family_model(name, attn_implementation=form)
    roles = dict.fromkeys(range(6), "full") | dict.fromkeys(family.layers, "reuse") | {family.layers[0]: "select"}
    defaults = {"budget": 12, "sinks": 2, "recent": 3}
    policy = tc.Policy.from_dict({"num_layers": 6, "defaults": defaults, "layers": roles})
    recorder = Recorder(policy=policy)
    got = decode(model, recorder, batch=1)
    assert recorder.after[0]["sparse_attention.default"] == len(family.layers) - 1
    prompt, tokens = random_tokens(1, PROMPT), random_tokens(1, STEPS, seed=2)
    expected = OracleModel(model, roles_of(policy)).logits(prompt, tokens)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)
    assert (got - decode(model, None, batch=1)).abs().max() > 1e-3  # the budget is felt


def test_every_family_has_a_shape_and_explains_itself():
    assert set(FAMILIES) == set(shapes.FAMILIES)
    for name, family in FAMILIES.items():
        rows = tc.explain(load_model(f"random:{name}", "meta"), "full").rows
        assert [row.layer for row in rows if row.role] == family.layers, name
        assert {row.reason for row in rows if not row.role} == ({family.reason} if family.left else set()), name
        torch._dynamo.reset()


def test_the_documentation_has_the_table_of_today():
    assert PAGE.read_text() == with_table(PAGE.read_text()), "run python tests/families.py"
