"""tidal_compile: a torch.compile backend for long-context decoding.

policy = tidal_compile.Policy.preset("tidal", num_layers=32, budget=1024)
step = torch.compile(model, backend="tidal", fullgraph=True, options={"policy": policy})
model.generate(**inputs, cache_implementation="static", compile_config=tidal_compile.compile_config(policy))
tidal_compile.generate(model, **inputs, policy=policy, max_new_tokens=100)
print(tidal_compile.explain(model, policy))
best = tidal_compile.calibrate(model, tokenizer, text, budget=1024, selections=3)
records = tidal_compile.evaluate(model, tokenizer, [best, "tidal"], text=text)
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import PolicyError, TidalError, UnsupportedModelError

if TYPE_CHECKING:
    from .backend import compile_config
    from .cache import Fp8Cache, HostCache
    from .calibrate import calibrate, calibrate_curve
    from .evaluate import evaluate
    from .explain import explain
    from .generate import generate
    from .policy import Policy
    from .settings import CalibrationSettings, EvaluationSettings
    from .weights import pack_weights

__version__ = "0.2.0"

__all__ = [
    "CalibrationSettings",
    "EvaluationSettings",
    "Fp8Cache",
    "HostCache",
    "Policy",
    "PolicyError",
    "TidalError",
    "UnsupportedModelError",
    "__version__",
    "calibrate",
    "calibrate_curve",
    "compile_config",
    "evaluate",
    "explain",
    "generate",
    "pack_weights",
]

_HOMES = {
    "CalibrationSettings": "settings",
    "EvaluationSettings": "settings",
    "Fp8Cache": "cache",
    "HostCache": "cache",
    "Policy": "policy",
    "calibrate": "calibrate",
    "calibrate_curve": "calibrate",
    "compile_config": "backend",
    "evaluate": "evaluate",
    "explain": "explain",
    "generate": "generate",
    "pack_weights": "weights",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch takes seconds, which `--help` and policy files don't need."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Importing the submodule `explain` would bind its name here, over the function `explain` that is meant."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
