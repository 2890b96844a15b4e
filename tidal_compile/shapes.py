"""Shapes of models for `random:<shape>`: arguments of transformers' configs, filled with random weights.

`PUBLISHED` are real models' shapes, to measure latency with. `FAMILIES` are tiny ones, one for each architecture that
the tests try: enough to see what `explain` makes of it.
"""

from typing import Any

PUBLISHED: dict[str, dict[str, Any]] = {
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
    "qwen2.5-7b": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
    },
    "qwen2.5-14b": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 13824,
        "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
    },
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
}  # fmt: skip

# Weights large enough that attention is peaked, so that what is left out shows
TINY: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip

_MIXED = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 3}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES: dict[str, dict[str, Any]] = {
    name: {**TINY, "model_type": name, **settings}
    for name, settings in {
        "llama": {},
        "mistral": {"sliding_window": None},
        "mixtral": _EXPERTS,
        "qwen2": {},
        "qwen3": {},
        "qwen3_moe": _ROUTED,
        "phi": {},
        "phi3": {},
        "gemma": {},
        "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
        "gemma3": {"model_type": "gemma3_text", "query_pre_attn_scalar": 16, **_MIXED},
        "olmo2": {},
        "granite": {"attention_multiplier": 0.37},
        "cohere": {},
        "cohere2": _MIXED,
        "glm4": {},
        "stablelm": {},
        "starcoder2": {"sliding_window": None},
        "smollm3": {},
        "nemotron": {},
        "helium": {},
        "gpt_neox": {"num_key_value_heads": 4},
        "gpt2": {"num_key_value_heads": 4, "n_positions": 512, "n_embd": 64, "n_layer": 6, "n_head": 4},
        "gpt_oss": {
            **_MIXED, **_EXPERTS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "qwen3_next": {
            **_ROUTED, "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"] * 3,
        },
        "deepseek_v3": {
            "num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
            "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
        },
        "exaone4": _MIXED,
    }.items()
}  # fmt: skip

SHAPES = PUBLISHED | FAMILIES
FORMS = (
    "smollm2, gemma3-270m, a Hugging Face name or folder, a .gguf file, or random:<shape>: "
    f"{', '.join(PUBLISHED)}; tiny {', '.join(FAMILIES)}; any other model_type of transformers at its default size"
)


def is_random(name: str) -> bool:
    """Whether a model has random weights: good for latency, and for nothing that it says."""
    return name.startswith("random:")
