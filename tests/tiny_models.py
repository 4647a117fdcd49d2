"""config.json of tiny models, which tests make with random weights."""

from __future__ import annotations

DEEPSEEK = {
    "model_type": "deepseek_v2",
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
}
MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
}
#: Delta nets and attention; layers without experts between and behind those with experts.
HYBRID = {
    "model_type": "qwen3_next",
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 4,
    "layer_types": [f"{kind}_attention" for kind in ("linear", "linear", "full", "linear")],
    "mlp_only_layers": [1, 3],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
}
#: gpt-oss's attention and experts: sinks, biases, a window in the first layer.
OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 9,
    "num_local_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
}
#: Two MoE layers of 16 experts and byte tokens, served by the tests of whole clusters.
SERVED = DEEPSEEK | {
    "vocab_size": 260,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 2.0,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
}
