"""Tiny random models, and what tests do with them."""

import torch
from policies import one_selects
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from tidal_compile.explain import decode_calls
from tidal_compile.models import with_cache
from tidal_compile.passes.match import AttentionSite
from tidal_compile.shapes import FAMILIES, TINY


def tiny_model(model_type="llama", seed=0, device="cpu", dtype=torch.float32, **settings):
    """A random decoder with weights large enough that attention is peaked, and what is left out shows."""
    torch.manual_seed(seed)
    shape = {name: value for name, value in TINY.items() if name != "head_dim"}
    config = AutoConfig.for_model(model_type, **{**shape, **settings})
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def small_model(**settings):
    """Two layers that end a text, and pad it."""
    model = tiny_model(**{"num_hidden_layers": 2, "eos_token_id": 7, **settings})
    model.generation_config.pad_token_id = 0
    return model


def long_model(**settings):
    """Room for 2048 tokens, and four layers: a calibration or an evaluation traces the model, and tries its layers."""
    return tiny_model(**{"num_hidden_layers": 4, "max_position_embeddings": 2048, **settings})


def family_model(name, depth=6, **settings):
    """The tiny model of a family in `FAMILIES`, or its first layers."""
    if depth < 6:
        kinds = tiny_model(**FAMILIES[name], device="meta").config.to_dict().get("layer_types") or []
        types = {"layer_types": kinds[:depth]} if len(set(kinds)) > 1 else {}
        settings = {"num_hidden_layers": depth, **types, **settings}
    return tiny_model(**{**FAMILIES[name], **settings})


def family_pair(name, **settings):
    """Two layers of it, as transformers' own tests have; in a model that mixes, the first slides and the second does not."""
    return family_model(name, 2, **settings)


MODELS = {
    "gqa2": lambda: tiny_model(num_hidden_layers=4),
    "gqa3": lambda: tiny_model(num_hidden_layers=4, hidden_size=96, num_attention_heads=6),
    "mqa": lambda: tiny_model("qwen2", num_hidden_layers=4, num_key_value_heads=1),
    "mha": lambda: tiny_model("phi", num_hidden_layers=4, num_key_value_heads=4),
}


def random_tokens(batch, length, seed=1, vocab=128):
    return torch.randint(2, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def prefilled(model, ids, slots, mask=None):
    """A StaticCache of `slots` that holds ids `[B, n]`; padding as `mask [B, n]`."""
    cache = StaticCache(config=model.config, max_cache_len=slots)
    model(input_ids=ids, attention_mask=mask, **with_cache(model, cache))
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


# Families whose layers, caches or module numbers are unusual; `odd_model` makes a tiny one. Not all are in FAMILIES:
# what holds for them is said where they are tested.
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2, "head_dim": 16,
}  # fmt: skip
_SHARED = {
    "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
    "head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128,
}  # fmt: skip
ODD = {
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 100, "num_experts": 2, "mamba_d_state": 8},
    "bamba": {
        "attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
    },
    "zamba": {
        "num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1, "n_mamba_heads": 2, "mamba_d_state": 8, "num_key_value_heads": 4,
    },
    "zamba2": {
        "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "num_mem_blocks": 1, "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2, "adapter_rank": 4, "use_mem_rope": True,
    },
    "falcon_h1": {
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "head_dim": 16,
    },
    "qwen3_5_text": _LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "gemma3n_text": {
        **_SHARED, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [96] * 4,
        "altup_num_inputs": 2,
    },
    "gemma4_text": {**_SHARED, "global_head_dim": 16},
    "hrm_text": {"num_hidden_layers": 2, "H_cycles": 2, "L_cycles": 1, "head_dim": 16, "prefix_lm": False},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
}  # fmt: skip


def odd_model(name, **settings):
    """A tiny model of a family in `ODD`, of four layers if nothing else is said."""
    return tiny_model(name, **{"num_hidden_layers": 4, "max_position_embeddings": 2048, **ODD[name], **settings})


def sparse_for(model, budget=12, sinks=2, recent=3):
    """A policy whose first layer that can select does, and whose other ones reuse its tokens; the attention calls."""
    calls, num_layers = decode_calls(model)
    layers = [call.layer for call in calls if isinstance(call, AttentionSite)]
    return one_selects(num_layers, layers, budget, sinks, recent), calls
