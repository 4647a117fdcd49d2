"""Routing traces: which experts the tokens of each topic chose, measured or made here."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import zipfile
from collections.abc import Sequence

import numpy as np

from dance_jax.config import UserError

GPT_OSS = "gpt_oss_20b_mmlu_pro.npz"
OLMOE_MIXTRAL = "olmoe_mixtral_counts.json"
GPT_OSS_WORKLOADS = (
    ("law", "history", "philosophy"),
    ("math", "physics", "chemistry", "engineering"),
    ("health", "biology", "psychology"),
)
GPT_OSS_ALONE = ("law", "math", "health")
DOMAINS = ("arxiv", "github", "wikipedia")


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """One model's routes and counts by topic."""

    name: str
    #: Of a layer.
    experts: int
    #: Of each topic, int [tokens, layers, k]: the experts that each token chose.
    routes: dict[str, np.ndarray]
    #: Of each topic, int64 [layers, experts]: calls, of other tokens too.
    counts: dict[str, np.ndarray]
    #: Topics of each of three servers.
    workloads: tuple[tuple[str, ...], ...]
    #: The topic of each of three servers where only counts are known.
    alone: tuple[str, ...]
    #: There are published figures for it.
    published: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class CountsAlone:
    """A model of which only counts are known."""

    name: str
    domains: tuple[str, ...]
    #: int64 [domains, layers, experts].
    counts: np.ndarray


def count(route_tlk: np.ndarray, experts: int) -> np.ndarray:
    """Calls of every expert: int64 [layers, experts]."""
    layers = route_tlk.shape[1]
    return np.stack(
        [np.bincount(route_tlk[:, layer].ravel(), minlength=experts) for layer in range(layers)]
    )


def synthetic_trace(
    tokens: int = 2000,
    layers: int = 12,
    experts: int = 64,
    k: int = 6,
    seed: int = 0,
    topics: Sequence[str] = ("a", "b", "c"),
) -> Trace:
    """Topics with their own expert preferences.

    Logits of a token: a preference of its topic, shared by all its tokens, plus noise.
    """
    rng = np.random.default_rng(seed)
    routes = {}
    for topic in topics:
        preference_le = 0.6 * rng.gumbel(size=(layers, experts))
        logits_tle = preference_le + rng.gumbel(size=(tokens, layers, experts))
        routes[topic] = np.argpartition(-logits_tle, k - 1)[:, :, :k].astype(np.int16)
    counts = {topic: count(route, experts) for topic, route in routes.items()}
    return Trace("synthetic", experts, routes, counts, tuple((t,) for t in topics), tuple(topics))


def read_trace(directory: pathlib.Path) -> Trace:
    """gpt-oss-20b on MMLU-Pro.

    Raises:
        UserError: the directory or the file is missing, or holds something else.
    """
    if not directory.is_dir():
        raise UserError(f"--traces: {directory} is no directory")
    path = directory / GPT_OSS
    if not path.is_file():
        raise UserError(f"--traces: {directory} has no {GPT_OSS}")
    try:
        with np.load(path, allow_pickle=False) as file:
            topics = [str(topic) for topic in file["topics"]]
            counts = dict(zip(topics, file["counts"], strict=True))
            routes = {topic: file[f"routes_{n:02d}"] for n, topic in enumerate(topics)}
        experts = next(iter(counts.values())).shape[1]
        for topic, route in routes.items():
            if count(route, experts).shape != counts[topic].shape:
                raise ValueError(f"routes of {topic}: {route.shape} of {experts} experts")
    # TypeError: a plain .npy is no archive
    except (
        OSError, ValueError, KeyError, TypeError, IndexError, EOFError, StopIteration,
        zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise UserError(f"{path}: topics, counts and routes are needed ({error!r})") from error
    absent = {topic for topics in GPT_OSS_WORKLOADS for topic in topics} - routes.keys()
    if absent:
        raise UserError(f"{path}: no topic {', '.join(sorted(absent))}")
    name = "gpt-oss-20b, MMLU-Pro"
    return Trace(name, experts, routes, counts, GPT_OSS_WORKLOADS, GPT_OSS_ALONE, published=True)


def read_counts(directory: pathlib.Path) -> list[CountsAlone]:
    """OLMoE and Mixtral; none where the file is missing.

    Raises:
        UserError: the file holds something else.
    """
    path = directory / OLMOE_MIXTRAL
    if not path.is_file():
        return []
    try:
        trace = json.loads(path.read_text("utf-8"))
        models = []
        for key in ("olmoe", "mistral"):
            by_domain = trace["counts"][key]["topk"]
            counts_dle = np.array(
                [[by_domain[each][str(layer)] for layer in trace["layers"]] for each in DOMAINS],
                np.int64,
            )
            name = str(trace["models"][key]).partition(" ")[0]
            if counts_dle.ndim != 3:
                raise ValueError(f"counts of {name}: {counts_dle.shape}")
            models.append(CountsAlone(name, DOMAINS, counts_dle))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: counts by model, domain and layer are needed ({error!r})"
        ) from error
    return models
