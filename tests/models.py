"""Tiny random models, and what tests do with them."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from tidal_compile.shapes import FAMILIES, TINY


def tiny_model(model_type="llama", seed=0, device="cpu", dtype=torch.float32, **settings):
    """A random decoder with weights large enough that attention is peaked, and what is left out shows."""
    torch.manual_seed(seed)
    shape = {name: value for name, value in TINY.items() if name != "head_dim"}
    config = AutoConfig.for_model(model_type, **{**shape, **settings})
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def family_model(name, **settings):
    """The tiny model of a family in `FAMILIES`."""
    return tiny_model(**{**FAMILIES[name], **settings})


def family_pair(name, **settings):
    """Two layers of it, as transformers' own tests have; in a model that mixes, the first slides and the second does not."""
    kinds = family_model(name, device="meta").config.to_dict().get("layer_types") or []
    types = {"layer_types": kinds[:2]} if len(set(kinds)) > 1 else {}
    return family_model(name, **{"num_hidden_layers": 2, **types, **settings})


MODELS = {
    "gqa2": lambda: tiny_model(),
    "gqa3": lambda: tiny_model(hidden_size=96, num_attention_heads=6),
    "mqa": lambda: tiny_model("qwen2", num_key_value_heads=1),
    "mha": lambda: tiny_model("phi", num_key_value_heads=4),
}


def random_tokens(batch, length, seed=1, vocab=128):
    return torch.randint(2, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def prefilled(model, ids, slots, mask=None):
    """A StaticCache of `slots` that holds ids `[B, n]`; padding as `mask [B, n]`."""
    cache = StaticCache(config=model.config, max_cache_len=slots)
    model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def decode_logits(step, cache, tokens, masks=None):
    """Teacher-forced decoding: the logits `[B, T, vocab]` after each of tokens `[B, T]`. masks: one 4-D mask a step."""
    rows = []
    for i in range(tokens.shape[1]):
        extra = {} if masks is None else {"attention_mask": masks[i]}
        out = step(
            input_ids=tokens[:, i : i + 1].clone(memory_format=torch.contiguous_format),
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
        rows.append(out.logits[:, -1].clone())
    return torch.stack(rows, 1)
