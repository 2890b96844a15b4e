"""tidal_compile: a torch.compile backend for long-context decoding.

policy = tidal_compile.Policy.preset("tidal", num_layers=32, budget=1024)
step = torch.compile(model, backend="tidal", fullgraph=True, options={"policy": policy})
model.generate(**inputs, cache_implementation="static", compile_config=tidal_compile.compile_config(policy))
print(tidal_compile.explain(model, policy))
"""

from .backend import compile_config
from .calibrate import calibrate
from .errors import PolicyError, TidalError, UnsupportedModelError
from .explain import explain
from .policy import Policy

__all__ = ["Policy", "PolicyError", "TidalError", "UnsupportedModelError", "calibrate", "compile_config", "explain"]
