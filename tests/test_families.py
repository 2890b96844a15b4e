"""Every family of models that people run: what is matched, and that the answers are right. No Inductor here.

`full` is compared with the model as it is, a sparse policy with an oracle that has its own attention.
"""

import re

import pytest
import torch
from families import FAMILIES, PAGE, first_selects, with_table
from models import decode_logits, family_model, prefilled, random_tokens
from oracle import OracleModel, roles_of
from recorder import Recorder
from tiers import sampled

import tidal_compile as tc
from tidal_compile import shapes
from tidal_compile.models import load_model
from tidal_compile.passes.linears import join_linears
from tidal_compile.passes.match import count_layers, find_attention
from tidal_compile.passes.plan import make_plan
from tidal_compile.passes.rewrite import apply_plan
from tidal_compile.step import PolicyStep

PROMPT, STEPS, SLOTS = 40, 4, 48
SITES = [(name, form) for name, family in FAMILIES.items() if family.sites for form in family.implementations]


class Traced(PolicyStep):
    """The step, uncompiled, that also keeps what the matcher found in each graph: one trace serves all policies."""

    def __init__(self, model):
        self.graphs = []
        super().__init__(model)

    def _follow(self, gm, inputs):
        self.graphs.append((find_attention(gm), count_layers(gm)))
        return super()._follow(gm, inputs)


def decode(model, step, prompt, tokens, policy=None):
    """Prefill, then a few steps: logits `[B, T, vocab]` of the model, or of its graph under a policy."""
    run = model if policy is None else lambda **inputs: step(policy.roles, **inputs)
    return decode_logits(run, prefilled(model, prompt, SLOTS), tokens)


@pytest.fixture
def joined(monkeypatch):
    """The step with its linear layers joined: how many, for every policy."""
    counts = []

    def apply(gm, plan):
        kept = apply_plan(gm, plan)
        counts.append(join_linears(gm))
        return kept

    monkeypatch.setattr("tidal_compile.step.apply_plan", apply)
    return counts


@pytest.mark.parametrize(
    ("name", "form"),
    sampled(
        SITES, [(name, form) for name, form in SITES if form == FAMILIES[name].implementations[0] or name == "llama"]
    ),
)
def test_full_equals_eager_and_sparse_the_oracle(name, form, joined):
    """A single sequence also has its linear layers joined, as on a GPU; in float32, several haven't."""
    family, batch = FAMILIES[name], 1 if form == FAMILIES[name].implementations[0] else 2
    depth = 2 if family.sites == 6 else 4  # two layers that can select
    model, (policy, layers) = family_model(name, depth, attn_implementation=form), first_selects(name, depth)
    step, prompt, tokens = Traced(model), random_tokens(batch, PROMPT), random_tokens(batch, STEPS, seed=2)
    eager = decode(model, step, prompt, tokens)
    full = decode(model, step, prompt, tokens, tc.Policy.preset("full", depth))
    torch.testing.assert_close(full, eager, atol=2e-4, rtol=2e-4)

    sparse = decode(model, step, prompt, tokens, policy)
    expected = OracleModel(model, roles_of(policy)).logits(prompt, tokens)
    torch.testing.assert_close(sparse, expected, atol=2e-4, rtol=2e-4)
    assert (sparse - eager).abs().max() > 1e-3  # the budget is felt

    ((calls, num_layers),) = step.graphs  # for all steps and both policies
    plan = make_plan(calls, policy.roles)
    assert num_layers == depth and plan.problems == ()
    assert [decision.layer for decision in plan.decisions if decision.role] == layers
    left = depth - len(layers) if family.left else 0
    assert [decision.reason for decision in plan.decisions if not decision.role] == [family.reason] * left
    assert len(joined) == 2 and all(count > 0 if batch == 1 else count == 0 for count in joined)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.sites])
def test_what_is_refused(name):
    family, model = FAMILIES[name], family_model(name, 2)
    with pytest.raises(tc.UnsupportedModelError, match=re.escape(family.reason)):
        step = torch.compile(model, backend=Recorder(policy="full"), fullgraph=True)
        decode_logits(step, prefilled(model, random_tokens(1, PROMPT), SLOTS), random_tokens(1, 1))


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "qwen3_next", "deepseek_v3"])
def test_a_family_explains_itself(name):
    """Of those with calls that are left alone, without weights; the others are explained by what is traced above."""
    assert load_model(f"random:{name}", "meta").config.num_hidden_layers == 6
    family, rows = FAMILIES[name], tc.explain(family_model(name, 2, device="meta"), "full").rows
    assert [row.layer for row in rows if row.role] == [layer for layer in family.layers if layer < 2]
    assert {row.reason for row in rows if not row.role} == ({family.reason} if family.left else set())


def test_every_family_has_a_shape():
    assert set(FAMILIES) == set(shapes.FAMILIES)


def test_the_documentation_has_the_table_of_today():
    assert PAGE.read_text() == with_table(PAGE.read_text()), "run python tests/families.py"
