"""A backend that rewrites as `tidal` does and then runs the graph as it is: passes are tested without Inductor."""

from tidal_compile.backend import Options, past_dynamo, plan_graph
from tidal_compile.passes.counters import take_out_counters
from tidal_compile.passes.linears import join_linears
from tidal_compile.passes.rewrite import apply_plan
from tidal_compile.passes.state import around, take_out_inputs


class Recorder:
    """`torch.compile(model, backend=Recorder(policy=...))`; keeps the op counts before and after, and the graph."""

    def __init__(self, **options):
        self.options, self.before, self.after, self.plans, self.graphs = Options.parse(options), [], [], [], []

    def __call__(self, gm, example_inputs):
        return past_dynamo(self._rewrite)(gm, example_inputs)

    def _rewrite(self, gm, example_inputs):
        self.before.append(op_counts(gm))
        plan = plan_graph(gm, self.options)
        kept = []
        if plan is not None:
            kept = apply_plan(gm, plan)
            if self.options.linears:
                join_linears(gm)
        self.plans.append(plan)
        self.after.append(op_counts(gm))
        self.graphs.append(gm)
        counters = take_out_counters(gm) if plan is not None else None
        take_out_inputs(gm, kept)
        return around(kept, gm.forward if counters is None else counters.around(gm.forward))


def op_counts(gm):
    """How often each function or method is called: {name: count}."""
    counts = {}
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method"):
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            counts[name] = counts.get(name, 0) + 1
    return counts
