"""What each placement policy costs on routing traces.

    python benchmarks/placement.py                # a synthetic trace, made here
    python benchmarks/placement.py --traces DIR   # measured ones: gpt_oss_20b_mmlu_pro.npz and,
                                                  # where there, olmoe_mixtral_counts.json

Every server has its own workload. Policies see the first half of each topic's tokens, the table
is measured on the second half. Every server weighs equally. Columns (dance_jax.placement.metrics):
remote: share of expert calls that leave the server; transfers: remote servers a token visits per
layer; busiest: hidden states into or out of the busiest server of a layer, per token of a server;
load: largest share of a layer's calls on one device; ms: time to solve, compiled.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Sequence

import numpy as np

from dance_jax.placement import POLICIES, place

DEVICES = (1, 1, 2)
#: Expert slots of all servers together, in copies of the model.
MEMORY = 1.32
GPT_OSS_WORKLOADS = (
    ("law", "history", "philosophy"),
    ("math", "physics", "chemistry", "engineering"),
    ("health", "biology", "psychology"),
)


def synthetic_routes(
    tokens: int = 2000, layers: int = 12, experts: int = 64, k: int = 6, seed: int = 0
) -> list[np.ndarray]:
    """Three workloads with their own expert preferences: per server int [tokens, layers, k].

    Logits of a token: a preference of its workload, shared by all its tokens, plus noise.
    """
    rng = np.random.default_rng(seed)
    routes = []
    for _ in DEVICES:
        preference_le = 0.6 * rng.gumbel(size=(layers, experts))
        logits_tle = preference_le + rng.gumbel(size=(tokens, layers, experts))
        routes.append(np.argsort(-logits_tle, axis=2)[:, :, :k])
    return routes


def count(routes: Sequence[np.ndarray], experts: int) -> np.ndarray:
    """Calls of every expert: int64 [servers, layers, experts]."""
    layers = routes[0].shape[1]
    return np.stack(
        [
            [np.bincount(route[:, layer].ravel(), minlength=experts) for layer in range(layers)]
            for route in routes
        ]
    )


def slots(total: int) -> list[int]:
    """Capacities of servers whose devices are all equal, MEMORY copies of `total` in all."""
    return [int(MEMORY * total * devices / sum(DEVICES)) for devices in DEVICES]


def normalised(counts: np.ndarray) -> np.ndarray:
    return counts / counts.sum((1, 2), keepdims=True)


def solved(policy: str, counts: np.ndarray, capacities: Sequence[int], routes=None):
    """The placement and the milliseconds of a second, compiled run."""
    for _ in range(2):
        start = time.perf_counter()
        placement = place(policy, counts, capacities, routes=routes, devices=DEVICES)
    return placement, (time.perf_counter() - start) * 1e3


def print_routes(title: str, fit: list[np.ndarray], test: list[np.ndarray], experts: int) -> None:
    counts = normalised(count(fit, experts))
    capacities = slots(fit[0].shape[1] * experts)
    print(f"\n{title}: {fit[0].shape[1]} layers x {experts} experts, slots {capacities}")
    print(f"{'policy':12}{'remote':>9}{'transfers':>11}{'busiest':>9}{'load':>8}{'ms':>9}")
    for policy in POLICIES:
        placement, ms = solved(policy, counts, capacities, fit)
        traffic = placement.traffic(test)
        print(
            f"{policy:12}{traffic.remote:9.3f}{traffic.transfers:11.3f}"
            f"{traffic.busiest:9.3f}{traffic.load(DEVICES):8.3f}{ms:9.1f}"
        )


def print_counts(title: str, counts: np.ndarray) -> None:
    counts = normalised(counts)
    capacities = slots(counts[0].size)
    print(f"\n{title}, counts alone: {counts.shape[1]} x {counts.shape[2]}, slots {capacities}")
    print(f"{'policy':12}{'remote':>9}{'ms':>9}")
    for policy in POLICIES:
        placement, ms = solved(policy, counts, capacities)
        print(f"{policy:12}{1 - placement.local_share(counts):9.3f}{ms:9.1f}")


def print_gpt_oss(path: pathlib.Path) -> None:
    with np.load(path, allow_pickle=False) as file:
        trace = {key: file[key] for key in file.files}
    topics = trace["topics"].tolist()
    fit, test = [], []
    for workload in GPT_OSS_WORKLOADS:
        routes = [trace[f"routes_{topics.index(topic):02d}"] for topic in workload]
        fit.append(np.concatenate([route[: len(route) // 2] for route in routes]))
        test.append(np.concatenate([route[len(route) // 2 :] for route in routes]))
    experts = trace["counts"].shape[2]
    print_routes("gpt-oss-20b, MMLU-Pro", fit, test, experts)
    alone = [trace["counts"][topics.index(topic)] for topic in ("law", "math", "health")]
    print_counts("gpt-oss-20b, law | math | health", np.stack(alone))


def print_json_counts(path: pathlib.Path) -> None:
    domains = ("arxiv", "github", "wikipedia")
    trace = json.loads(path.read_text())
    for model in ("olmoe", "mistral"):
        by_domain = trace["counts"][model]["topk"]
        chosen = [
            [by_domain[domain][str(layer)] for layer in trace["layers"]] for domain in domains
        ]
        print_counts(f"{trace['models'][model]}, {' | '.join(domains)}", np.array(chosen, float))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=pathlib.Path, help="directory of measured traces")
    directory = parser.parse_args().traces
    if directory is None:
        routes = synthetic_routes()
        half = len(routes[0]) // 2
        print_routes("synthetic", [r[:half] for r in routes], [r[half:] for r in routes], 64)
        return
    if not (directory / "gpt_oss_20b_mmlu_pro.npz").is_file():
        parser.error(f"--traces: {directory} has no gpt_oss_20b_mmlu_pro.npz")
    print_gpt_oss(directory / "gpt_oss_20b_mmlu_pro.npz")
    if (directory / "olmoe_mixtral_counts.json").is_file():
        print_json_counts(directory / "olmoe_mixtral_counts.json")


if __name__ == "__main__":
    main()
