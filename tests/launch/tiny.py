"""A tiny random DeepSeek-V2 with byte tokens, for launches that must start fast."""

from __future__ import annotations

import pathlib

from dance_jax.models.random_weights import write_random_checkpoint

#: Two MoE layers of 16 experts, 3 x 32 x 16 floats each.
FIELDS = {
    "model_type": "deepseek_v2",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 2.0,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "topk_method": "greedy",
    "n_group": None,
    "topk_group": None,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 1,
    "bos_token_id": 0,
}
LAYERS, EXPERTS = 2, 16
EXPERT_BYTES = 3 * 32 * 16 * 4

HOSTS = f"""\
alpha address=localhost devices=1 experts=14 bandwidth=500Mbps
beta  address=localhost devices=1 memory={11 * EXPERT_BYTES + 5}B  # 11 slots and a bit
gamma address=localhost devices=2 experts=10
"""


def write_model(directory: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """The model in Hugging Face format."""
    return write_random_checkpoint(directory, FIELDS, seed=seed)
