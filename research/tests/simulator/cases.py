"""Small clusters to simulate."""

from __future__ import annotations

import math

import numpy as np

from dance_jax.config import EngineConfig
from dance_jax.placement.core import Placement
from research.simulator import Model, Requests, Scenario, Server, Speed

CONFIG = EngineConfig(
    max_model_len=256, max_num_seqs=4, decode_rows=(2, 4), slice_rows=(1, 3), block_size=8
)
MODEL = Model(layers=3, experts=8, top_k=2, state_bytes=100)
#: Bytes of a row, of its sum, of a head of a dispatch among two servers and of a return.
ROW, REPLY, HEAD, REPLY_HEAD = 100 + 6 * 2, 100, 16 + 4 * 3, 16


def scenario(
    devices: tuple[int, ...] = (1,),
    resident: np.ndarray | None = None,
    routes: tuple[np.ndarray, ...] | None = None,
    requests: list[tuple[float, int, int, int]] | Requests = [(0.0, 0, 1, 1)],  # noqa: B006
    speed: Speed = Speed(),  # noqa: B008
    bandwidth: float = math.inf,
    delay: float = 0.0,
    model: Model = MODEL,
    **others: object,
) -> Scenario:
    """Equal servers that hold everything, unless something else is said."""
    num, slots = len(devices), model.layers * model.experts
    if resident is None:
        resident = np.ones((num, model.layers, model.experts), bool)
    if routes is None:
        routes = (np.broadcast_to(np.arange(model.top_k), (4, model.layers, model.top_k)),) * num
    if not isinstance(requests, Requests):
        requests = Requests(*map(np.array, zip(*requests, strict=True)))
    servers = tuple(Server(each, slots, speed, bandwidth, delay) for each in devices)
    given = {"config": CONFIG, "placement": Placement(resident), "routes": routes}
    return Scenario(servers=servers, model=model, requests=requests, **(given | others))  # type: ignore[arg-type]


def held(*experts: tuple[int, ...], model: Model = MODEL) -> np.ndarray:
    """Bool [servers, layers, experts]: what each server holds, in every layer."""
    resident = np.zeros((len(experts), model.layers, model.experts), bool)
    for n, each in enumerate(experts):
        resident[n][:, list(each)] = True
    return resident


ALL = tuple(range(MODEL.experts))
