"""Makes the reference checkpoints and outputs beside this file with transformers and PyTorch.

Run once, by hand, in an environment of its own (neither is a dependency of dance_jax):
    pip install torch==2.13.0 transformers==5.23.0 && python tests/reference/make_reference.py
Each case is a tiny random model in Hugging Face format and expected.npz: `prompt` [p], `prefill`
[p, vocab] logits, `greedy` [32] tokens and `decode` [32, vocab] logits, float32.
"""

import json
import pathlib
import shutil

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
STEPS = 32
#: Least gap between best and second token, and between the last expert chosen and the next.
TOKEN_MARGIN, EXPERT_MARGIN = 5e-3, 2e-5

DEEPSEEK = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
}
MIXTRAL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
}


def yarn(**more):
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        **more,
    }


#: name: (family, config fields, prompt tokens, stored dtype, bytes of a shard, older spelling)
CASES = {
    "deepseek_lite": (
        "deepseek_v2",
        DEEPSEEK
        | {
            "q_lora_rank": None,
            "first_k_dense_replace": 1,
            "n_shared_experts": 2,
            "topk_method": "greedy",
            "rms_norm_eps": 1e-3,
            "rope_parameters": yarn(mscale=0.707, mscale_all_dim=0.707),
        },
        150,
        "float32",
        None,
        True,
    ),
    "deepseek_full": (
        "deepseek_v2",
        DEEPSEEK
        | {
            "q_lora_rank": 24,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "rope_parameters": yarn(mscale=1.4, mscale_all_dim=0.6),
        },
        24,
        "float32",
        "100KB",
        False,
    ),
    "deepseek_tied": (
        "deepseek_v2",
        DEEPSEEK
        | {
            "q_lora_rank": 24,
            "first_k_dense_replace": 0,
            "n_shared_experts": 1,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        24,
        "bfloat16",
        None,
        False,
    ),
    "deepseek_yarn_plain": (
        "deepseek_v2",
        DEEPSEEK
        | {
            "q_lora_rank": None,
            "first_k_dense_replace": 2,
            "n_shared_experts": 1,
            "num_experts_per_tok": 1,
            "routed_scaling_factor": 1.5,
            "rope_parameters": yarn(mscale_all_dim=0.5),
        },
        24,
        "bfloat16",
        None,
        True,
    ),
    "mixtral": (
        "mixtral",
        MIXTRAL | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        24,
        "float32",
        None,
        True,
    ),
    "mixtral_window": (
        "mixtral",
        MIXTRAL
        | {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "sliding_window": 9,
            "tie_word_embeddings": True,
            "rope_parameters": yarn(),
        },
        24,
        "bfloat16",
        "80KB",
        False,
    ),
}


def build(family, fields, dtype, seed):
    names = {"deepseek_v2": "DeepseekV2", "mixtral": "Mixtral"}
    config = getattr(transformers, f"{names[family]}Config")(**fields)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{names[family]}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            values = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                values = 1 + 0.1 * values
            elif "embed_tokens" in name:
                values = values * (0.5 if fields.get("tie_word_embeddings") else 1.0)
            else:
                values = values * weight.shape[-1] ** -0.5
            # what is stored is what runs; buffers (rope's frequencies) stay float32
            weight.copy_(values.to(getattr(torch, dtype)).float())
    return model


@torch.no_grad()
def run(model, prompt):
    """Outputs of one model, and its smallest gaps between experts and between tokens."""
    gaps = []

    def watch(module, inputs, outputs):
        scores = outputs[0].float().softmax(-1)
        if getattr(module, "topk_method", "greedy") == "group_limited_greedy":
            groups = scores.view(-1, module.num_group, module.num_experts // module.num_group)
            best = groups.max(-1).values
            ordered = best.sort(-1, descending=True).values
            gaps.append((ordered[:, module.topk_group - 1] - ordered[:, module.topk_group]).min())
            kept = best >= ordered[:, module.topk_group - 1 : module.topk_group]
            scores = (groups * kept[..., None]).flatten(1)
        ordered = scores.sort(-1, descending=True).values
        gaps.append((ordered[:, module.top_k - 1] - ordered[:, module.top_k]).min())

    handles = [
        module.register_forward_hook(watch)
        for module in model.modules()
        if type(module).__name__.endswith(("TopkRouter", "TopKRouter"))
    ]
    output = model(torch.tensor([prompt]), use_cache=True)
    prefill, cache = output.logits[0], output.past_key_values
    logits, greedy, decode = prefill[-1], [], []
    for _ in range(STEPS):
        greedy.append(int(logits.argmax()))
        logits = model(torch.tensor([greedy[-1:]]), past_key_values=cache).logits[0, -1]
        decode.append(logits)
    for handle in handles:
        handle.remove()
    top = torch.cat([prefill[-1:], torch.stack(decode[:-1])]).topk(2).values
    margin = float((top[:, 0] - top[:, 1]).min())
    return (
        {
            "prompt": np.array(prompt, np.int32),
            "prefill": prefill.numpy(),
            "greedy": np.array(greedy, np.int32),
            "decode": torch.stack(decode).numpy(),
        },
        margin,
        float(min(gaps)),
    )


def older_spelling(path):
    """Rewrites config.json as transformers 4 wrote it."""
    fields = json.loads(path.read_text())
    rope = fields.pop("rope_parameters")
    fields["torch_dtype"] = fields.pop("dtype")
    fields["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    fields["rope_scaling"] = None if rope["type"] == "default" else rope
    fields["transformers_version"] = "4.39.3"
    path.write_text(json.dumps(fields, indent=2) + "\n")


def make(name):
    family, fields, length, dtype, shard, older = CASES[name]
    for seed in range(200):
        model = build(family, fields, dtype, seed)
        prompt = np.random.default_rng(seed).integers(2, fields["vocab_size"], length).tolist()
        expected, margin, gap = run(model, prompt)
        if margin > TOKEN_MARGIN and gap > EXPERT_MARGIN and len(set(expected["greedy"])) > 8:
            break
    else:
        raise SystemExit(f"{name}: no seed gives clear choices")
    directory = HERE / name
    shutil.rmtree(directory, ignore_errors=True)
    model.to(getattr(torch, dtype)).save_pretrained(
        directory, **({"max_shard_size": shard} if shard else {})
    )
    if older:
        older_spelling(directory / "config.json")
    np.savez_compressed(directory / "expected.npz", **expected)
    print(f"{name}: seed {seed}, token margin {margin:.4f}, expert margin {gap:.6f}")


if __name__ == "__main__":
    for case in CASES:
        make(case)
