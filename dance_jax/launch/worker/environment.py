"""Prepare a server's environment before JAX is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence

#: Prefixes of variables that would make JAX join another job; a launch itself decides who joins.
_FOREIGN = ("JAX_COORDINATOR", "JAX_NUM_", "JAX_PROCESS", "JAX_LOCAL_DEVICE")

#: Hosts that gRPC connects to directly, and, without that variable, hosts that all do.
_DIRECT, _ALL_DIRECT = "no_grpc_proxy", "no_proxy"


def prepare(platform: str, gpus: Sequence[int]) -> None:
    """Change os.environ for one engine process.

    Args:
        platform: "cpu" or "cuda".
        gpus: indices of the GPUs that the process may see; empty: all.
    """
    for name in [name for name in os.environ if name.startswith(_FOREIGN)]:
        del os.environ[name]
    os.environ["JAX_PLATFORMS"] = platform
    # The device count comes from the hosts file, not from a flag of a test or a user.
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if "host_platform_device_count" not in flag]
    if platform == "cpu":
        # A step is hundreds of small kernels around library matrix products: compiling with few
        # optimisations halves the start time and costs no measurable step time.
        flags = [
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_llvm_disable_expensive_passes=true",
            "--xla_backend_optimization_level=1",
            *flags,
        ]
    if platform == "cuda":
        # Each process compiles its own program, so autotuning results must not be shared.
        flags.append("--xla_gpu_shard_autotuning=false")
        # Number GPUs as nvidia-smi does.
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    os.environ["XLA_FLAGS"] = " ".join(flags)


def bypass_proxy(host: str) -> None:
    """Change os.environ so that gRPC connects to a host directly; all else uses the proxy as set.

    gRPC would send the traffic of jax.distributed through the proxy of http_proxy, which companies
    have for downloads and which does not reach the servers.

    Args:
        host: name or IP address, without a port.
    """
    known = os.environ.get(_DIRECT) or os.environ.get(_ALL_DIRECT, "")
    os.environ[_DIRECT] = ",".join(filter(None, (known, host)))
