"""Activation statistics: which experts the requests of each server chose."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Sequence

import numpy as np

from dance_jax.config import UserError
from dance_jax.files import whole_file


@dataclasses.dataclass(frozen=True, eq=False)
class Activations:
    """What the router chose for the requests of each server.

    Raises:
        UserError: shapes disagree, a count is negative, or a name is repeated.
    """

    #: Names of the servers, in the order of the other fields.
    servers: tuple[str, ...]
    #: int64 [servers, MoE layers, experts], expert calls.
    counts: np.ndarray
    #: Fingerprint of the model the statistics were made with; "" when unknown.
    model: str = ""
    #: Per server int16 [tokens, MoE layers, k], a bounded sample of chosen experts; or empty.
    routes: tuple[np.ndarray, ...] = ()

    def __post_init__(self):
        counts = np.asarray(self.counts)
        if not np.issubdtype(counts.dtype, np.integer):
            raise UserError(f"activations: counts are {counts.dtype}, integers are needed")
        if counts.ndim != 3 or counts.shape[0] != len(self.servers):
            raise UserError(
                f"activations: counts have shape {counts.shape}; "
                f"[{len(self.servers)} servers, layers, experts] is needed"
            )
        if len(set(self.servers)) != len(self.servers):
            raise UserError(f"activations: repeated server name in {', '.join(self.servers)}")
        if (counts < 0).any():
            raise UserError("activations: a count is negative")
        if self.routes and len(self.routes) != len(self.servers):
            raise UserError(
                f"activations: {len(self.routes)} arrays of routes for {len(self.servers)} servers"
            )
        layers, experts = counts.shape[1:]
        for name, route in zip(self.servers, self.routes, strict=False):
            if route.ndim != 3 or route.shape[1] != layers:
                raise UserError(
                    f"activations: routes of server {name} have shape {route.shape}; "
                    f"[tokens, {layers} layers, k] is needed"
                )
            if not np.issubdtype(route.dtype, np.integer) or (
                route.size and not (route.min() >= 0 and route.max() < experts)
            ):
                raise UserError(
                    f"activations: routes of server {name} are not expert numbers 0..{experts - 1}"
                )
        object.__setattr__(self, "servers", tuple(str(name) for name in self.servers))
        object.__setattr__(self, "counts", counts.astype(np.int64))
        object.__setattr__(self, "routes", tuple(r.astype(np.int16) for r in self.routes))

    @property
    def num_layers(self) -> int:
        return self.counts.shape[1]

    @property
    def num_experts(self) -> int:
        return self.counts.shape[2]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an npz file: `servers`, `counts`, `model` and `routes_0`, `routes_1`, ..."""
        arrays = {
            "servers": np.array(self.servers, dtype=np.str_),
            "counts": self.counts,
            "model": np.array(self.model, dtype=np.str_),
        }
        arrays |= {f"routes_{n}": route for n, route in enumerate(self.routes)}
        with whole_file(path) as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Activations:
        """Reads what `save` wrote.

        Raises:
            UserError: the file cannot be read, or a key is missing, unknown or of wrong shape.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
        # TypeError: a plain .npy is no archive
        except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: not a readable npz file of activations ({error})") from error
        missing = {"servers", "counts", "model"} - arrays.keys()
        if missing:
            raise UserError(f"{path}: missing {', '.join(sorted(missing))}")
        servers = tuple(str(name) for name in np.atleast_1d(arrays.pop("servers")))
        counts, model = arrays.pop("counts"), str(arrays.pop("model"))
        routes = []
        if "routes_0" in arrays:
            for n in range(len(servers)):
                if f"routes_{n}" not in arrays:
                    raise UserError(f"{path}: missing routes_{n}")
                routes.append(arrays.pop(f"routes_{n}"))
        if arrays:
            raise UserError(f"{path}: unknown {', '.join(sorted(arrays))}")
        try:
            return cls(servers, counts, model, tuple(routes))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def for_servers(self, names: Sequence[str]) -> Activations:
        """The statistics of the named servers, in that order.

        Raises:
            UserError: there are none for one of the names.
        """
        absent = [name for name in names if name not in self.servers]
        if absent:
            raise UserError(
                f"no activations for server {', '.join(absent)}; "
                f"there are some for {', '.join(self.servers)}"
            )
        order = [self.servers.index(name) for name in names]
        routes = tuple(self.routes[n] for n in order) if self.routes else ()
        return Activations(tuple(names), self.counts[order], self.model, routes)

    def check_model(self, fingerprint: str, num_layers: int, num_experts: int) -> None:
        """Raises UserError unless these are statistics of that model; "" on either side fits."""
        if (self.num_layers, self.num_experts) != (num_layers, num_experts):
            raise UserError(
                f"activations are of a model with {self.num_layers} MoE layers of "
                f"{self.num_experts} experts, not of {num_layers} x {num_experts}"
            )
        if self.model and fingerprint and self.model != fingerprint:
            raise UserError(
                f"activations were made with another model ({self.model}, not {fingerprint}); "
                "make new ones with --save-activations"
            )
