"""Makes the reference checkpoints and outputs beside this file with transformers and PyTorch.

Run by hand, in an environment of its own (neither is a dependency of dance_jax):
    pip install torch==2.13.0 transformers==5.23.0
    python tests/reference/make_reference.py [NAME ...]
Without a NAME all cases of cases.py are made. Each case is a directory with a tiny random model in
Hugging Face format and expected.npz: `prompt` [p], `prefill` [p, vocab] logits, `greedy` [32]
tokens and `decode` [32, vocab] logits. Everything is computed in float64 and stored as float32, so
any difference is an error of the program under test, not of the reference.
"""

import contextlib
import json
import pathlib
import re
import shutil
import sys

import numpy as np
import torch
import transformers
from cases import CASES, FAMILIES, Case
from published import as_published, older_spelling
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).parent
STEPS = 32
#: Minimum gap between the best and the second token, and between the last chosen and the first
#: dropped expert (or group). float32 must make the same choices.
TOKEN_MARGIN, EXPERT_MARGIN = 5e-3, 5e-5
#: Minimum number of distinct greedy tokens: a model that repeats itself tests little.
DISTINCT = 9
#: Minimum change of the logits if a stored tensor is not used: each must matter in a comparison.
EFFECT = 1e-3

#: How weights that are neither norms nor matrices are made from normal draws z. The first pattern
#: found in the tensor's name applies. The delta net's decays are slow enough for it to remember.
DRAWS = (
    (r"A_log$", lambda z: 0.5 * z - 1.5),
    (r"dt_bias$", lambda z: 0.5 * z),
    (r"sinks$", lambda z: z),
    (r"e_score_correction_bias$", lambda z: 0.2 * z),
    (r"(layer_scalar|per_expert_scale|router\.scale)$", lambda z: 1 + 0.3 * z),
    (r"bias$", lambda z: 0.3 * z),
    (r"router\.proj\.weight$", lambda z: z),
)


def stored(model):
    """Yields names and tensors of everything that a checkpoint of `model` has."""
    names = model.state_dict().keys()
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in names)


def draw(name, shape, case, generator):
    """Random values of one tensor, scaled to keep activations near 1."""
    family, values = FAMILIES[case.family], torch.randn(shape, generator=generator)
    for pattern, law in DRAWS:
        if re.search(pattern, name):
            return law(values)
    if len(shape) == 1:
        zero_centred = family.plus_one and "linear_attn.norm" not in name
        return 0.1 * values + (0 if zero_centred else 1)
    if "embed_tokens" in name:
        return values * case.embedding
    fan_in = shape[-2] if family.experts_in_out and len(shape) == 3 else shape[-1]
    return values * fan_in**-0.5


def stored_dtype(name, case):
    return torch.float32 if re.search(case.float32, name) else getattr(torch, case.dtype)


def build(case, seed):
    """A random float64 model whose weights are representable in the stored dtype."""
    family = FAMILIES[case.family]
    names = family.config or f"{family.model}Config"
    config = getattr(transformers, names)(**case.fields)
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, f"{family.model}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in stored(model):
            values = draw(name, weight.shape, case, generator)
            weight.copy_(values.to(stored_dtype(name, case)).float())
    return model.double()


@contextlib.contextmanager
def float64_only():
    """Turns transformers' explicit float32 (in norms, routers, softmax, rope) into float64."""
    single, method = torch.float32, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.float32 = torch.float = single
        torch.Tensor.float = method
        torch.set_default_dtype(single)


@contextlib.contextmanager
def watched_choices():
    """Yields a list that collects, for each torch.topk, the gap between kept and dropped values.

    Routers of all families choose experts and groups with torch.topk, so this works for all.
    """
    gaps, function, method = [], torch.topk, torch.Tensor.topk

    def watch(scores, k, dim=-1, **more):
        if k < scores.shape[dim]:
            ordered = scores.sort(dim=dim, descending=True).values
            gaps.append(float((ordered.select(dim, k - 1) - ordered.select(dim, k)).min()))
        return function(scores, k, dim=dim, **more)

    torch.topk = torch.Tensor.topk = watch
    try:
        yield gaps
    finally:
        torch.topk, torch.Tensor.topk = function, method


def run(model, prompt):
    """Outputs of one model, and its smallest gaps between experts and between tokens."""
    with torch.no_grad(), float64_only(), watched_choices() as gaps:
        output = model(torch.tensor([prompt]), use_cache=True)
        prefill, cache = output.logits[0], output.past_key_values
        logits, greedy, decode = prefill[-1], [], []
        for _ in range(STEPS):
            greedy.append(int(logits.argmax()))
            logits = model(torch.tensor([greedy[-1:]]), past_key_values=cache).logits[0, -1]
            decode.append(logits)
    top = torch.cat([prefill[-1:], torch.stack(decode[:-1])]).topk(2).values
    outputs = {
        "prompt": np.array(prompt, np.int32),
        "prefill": prefill.numpy(),
        "greedy": np.array(greedy, np.int32),
        "decode": torch.stack(decode).numpy(),
    }
    return outputs, float((top[:, 0] - top[:, 1]).min()), min(gaps)


def prefilled(model, tokens):
    """Logits [t, vocab] of all tokens computed at once, without a cache."""
    with torch.no_grad(), float64_only():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def check(model, outputs):
    """Refuses outputs that are not float64, and models with a tensor that changes nothing.

    Decoding step by step and all at once add numbers in another order; in float64 they agree to
    1e-9. To test a tensor's effect, a vector is replaced by its mean, which keeps a norm a norm,
    and any other tensor by zeros.
    """
    prompt, greedy = outputs["prompt"].tolist(), outputs["greedy"].tolist()
    together = prefilled(model, prompt + greedy)
    error = np.abs(together - np.concatenate([outputs["prefill"], outputs["decode"]])).max()
    if error > 1e-9:
        raise SystemExit(f"decoding differs by {error} from prefilling: something is not float64")
    for name, weight in stored(model):
        kept = weight.detach().clone()
        vector = kept.dim() == 1 and kept.numel() > 1
        weight.data = torch.full_like(kept, kept.mean()) if vector else torch.zeros_like(kept)
        change = np.abs(prefilled(model, prompt) - outputs["prefill"]).max()
        weight.data = kept
        if change < EFFECT:
            raise SystemExit(f"{name} changes the logits by no more than {change}")


def save(model, case, directory):
    """Writes the model in the form that its case asks for."""
    shutil.rmtree(directory, ignore_errors=True)
    for name, weight in stored(model):
        weight.data = weight.data.to(stored_dtype(name, case))
    options = {"max_shard_size": case.shard} if case.shard else {}
    model.save_pretrained(directory, save_original_format=not case.fused, **options)
    if case.edits:
        tensors = load_file(directory / "model.safetensors")
        for edit in case.edits:
            edit(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    config = json.loads(path.read_text())
    if case.older:
        older_spelling(config)
    if case.spelling:
        config = as_published(config, case.spelling)
    if case.older or case.spelling:
        path.write_text(json.dumps(config, indent=2) + "\n")


def clear_model(name: str, case: Case):
    """The first random model with clear choices: the model, its outputs and a report."""
    for seed in range(400):
        model = build(case, seed)
        prompt = np.random.default_rng(seed).integers(2, case.fields["vocab_size"], case.prompt)
        outputs, margin, gap = run(model, prompt.tolist())
        distinct = len(set(outputs["greedy"].tolist()))
        if margin > TOKEN_MARGIN and gap > EXPERT_MARGIN and distinct >= DISTINCT:
            report = f"token margin {margin:.4f}, expert margin {gap:.6f}, {distinct} tokens"
            return model, outputs, f"{name}: seed {seed}, {report}"
    raise SystemExit(f"{name}: no seed gives clear choices")


def make(name):
    case, directory = CASES[name], HERE / name
    model, outputs, report = clear_model(name, case)
    check(model, outputs)
    save(model, case, directory)
    single = {key: a.astype(np.float32) if a.dtype.kind == "f" else a for key, a in outputs.items()}
    np.savez_compressed(directory / "expected.npz", **single)
    size = sum(path.stat().st_size for path in directory.iterdir())
    print(f"{report}, {size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    for case in sys.argv[1:] or CASES:
        make(case)
