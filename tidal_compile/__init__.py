"""tidal_compile: a torch.compile backend for long-context decoding.

policy = tidal_compile.Policy.preset("tidal", num_layers=32, budget=1024)
step = torch.compile(model, backend="tidal", fullgraph=True, options={"policy": policy})
model.generate(**inputs, cache_implementation="static", compile_config=tidal_compile.compile_config(policy))
print(tidal_compile.explain(model, policy))
best = tidal_compile.calibrate(model, tokenizer, text, budget=1024, selections=3)
records = tidal_compile.evaluate(model, tokenizer, [best, "tidal"], text=text)
"""

from .backend import compile_config
from .calibrate import calibrate, calibrate_curve
from .errors import PolicyError, TidalError, UnsupportedModelError
from .evaluate import evaluate
from .explain import explain
from .policy import Policy

__all__ = [
    "Policy",
    "PolicyError",
    "TidalError",
    "UnsupportedModelError",
    "calibrate",
    "calibrate_curve",
    "compile_config",
    "evaluate",
    "explain",
]
