"""Write a training checkpoint as a Hugging Face DeepSeek-V2 folder (bfloat16, one file).

python export.py --work W --out ../../dance_jax/demo
"""

import argparse
import json
import os
import pickle
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from model import Config, Params
from safetensors.numpy import save_file
from tokenizer import BOS, EOS, PAD

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Assistant: {{ message['content'] }}{{ eos_token }}"
    "{% elif message['role'] == 'user' %}User: {{ message['content'] }}\n"
    "{% else %}{{ message['content'] }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
CONTEXT = 2048
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2


def hf_config(c: Config) -> dict:
    """Return the content of the model's config.json."""
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "aux_loss_alpha": c.balance,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": c.hidden,
        "initializer_range": 0.02,
        "intermediate_size": c.dense_width,
        "kv_lora_rank": c.kv_rank,
        "max_position_embeddings": CONTEXT,
        "model_type": "deepseek_v2",
        "moe_intermediate_size": c.expert_width,
        "moe_layer_freq": 1,
        "n_group": None,
        "n_routed_experts": c.experts,
        "n_shared_experts": c.shared_experts,
        "norm_topk_prob": False,
        "num_attention_heads": c.heads,
        "num_experts_per_tok": c.experts_per_token,
        "num_hidden_layers": c.layers,
        "num_key_value_heads": c.heads,
        "q_lora_rank": None,
        "qk_nope_head_dim": c.nope,
        "qk_rope_head_dim": c.rope,
        "rms_norm_eps": c.epsilon,
        "rope_scaling": None,
        "rope_theta": c.rope_theta,
        "routed_scaling_factor": c.routed_scale,
        "scoring_func": "softmax",
        "seq_aux": False,
        "tie_word_embeddings": False,
        "topk_group": None,
        "topk_method": "greedy",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "v_head_dim": c.value,
        "vocab_size": c.vocab,
    }


def hf_tensors(params: Params, c: Config) -> dict[str, np.ndarray]:
    """Return the tensors by their Hugging Face names, with matrices as [out, in]."""
    tensors = {
        "model.embed_tokens.weight": params["embed"],
        "model.norm.weight": params["norm"],
        "lm_head.weight": params["head"],
    }

    def put_ffn(prefix: str, weights: Params, expert: int | None = None) -> None:
        for name in ("gate", "up", "down"):
            matrix = weights[name] if expert is None else weights[name][expert]
            tensors[f"{prefix}.{name}_proj.weight"] = matrix.T

    for index, layer in enumerate(params["layers"]):
        root = f"model.layers.{index}"
        tensors[f"{root}.input_layernorm.weight"] = layer["norm1"]
        tensors[f"{root}.post_attention_layernorm.weight"] = layer["norm2"]
        tensors[f"{root}.self_attn.kv_a_layernorm.weight"] = layer["kv_norm"]
        tensors[f"{root}.self_attn.q_proj.weight"] = layer["q"].T
        tensors[f"{root}.self_attn.kv_a_proj_with_mqa.weight"] = layer["kv_a"].T
        tensors[f"{root}.self_attn.kv_b_proj.weight"] = layer["kv_b"].T
        tensors[f"{root}.self_attn.o_proj.weight"] = layer["o"].T
        if "mlp" in layer:
            put_ffn(f"{root}.mlp", layer["mlp"])
            continue
        tensors[f"{root}.mlp.gate.weight"] = layer["router"].T
        put_ffn(f"{root}.mlp.shared_experts", layer["shared"])
        for expert in range(c.experts):
            put_ffn(f"{root}.mlp.experts.{expert}", layer["experts"], expert)
    return {
        name: np.ascontiguousarray(np.asarray(value).astype(ml_dtypes.bfloat16))
        for name, value in tensors.items()
    }


def export(params: Params, c: Config, tokenizer_json: Path, out: Path) -> None:
    """Write every file to a folder beside `out`, then move them into place one by one."""
    out.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    tokenizer_config = {
        "add_bos_token": True,
        "add_eos_token": False,
        **special,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        new = Path(name)
        save_file(hf_tensors(params, c), new / "model.safetensors", {"format": "pt"})
        (new / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
        for file, content in (
            ("config.json", hf_config(c)),
            ("generation_config.json", generation),
            ("tokenizer_config.json", tokenizer_config),
        ):
            (new / file).write_text(json.dumps(content, indent=2) + "\n")
        for path in sorted(new.iterdir()):
            os.chmod(path, 0o644)
            os.replace(path, out / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of train.py")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    args = parser.parse_args()
    saved = pickle.loads((args.work / "checkpoint.pickle").read_bytes())
    print(saved["counters"])
    export(saved["arrays"][0], Config(), args.work / "tokenizer.json", args.out)


if __name__ == "__main__":
    main()
