"""A server's environment, made before JAX is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence

#: Would steer JAX elsewhere: a launch says itself who takes part.
_FOREIGN = ("JAX_COORDINATOR", "JAX_NUM_", "JAX_PROCESS", "JAX_LOCAL_DEVICE")


def prepare(platform: str, gpus: Sequence[int]) -> None:
    """Changes os.environ for one engine process.

    Args:
        platform: "cpu" or "cuda".
        gpus: numbers of the GPUs it may see; empty: all.
    """
    for name in [name for name in os.environ if name.startswith(_FOREIGN)]:
        del os.environ[name]
    os.environ["JAX_PLATFORMS"] = platform
    # A server's device count is its line's, not a test's or a user's flag.
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if "host_platform_device_count" not in flag]
    if platform == "cpu":
        # A step is hundreds of small kernels around library matrix products: compiling them
        # plainly halves the time to start and costs no measurable time in the step.
        flags = [
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_llvm_disable_expensive_passes=true",
            "--xla_backend_optimization_level=1",
            *flags,
        ]
    if platform == "cuda":
        # Each process compiles its own program, so results of autotuning are not to be shared.
        flags.append("--xla_gpu_shard_autotuning=false")
        # GPUs are numbered as nvidia-smi numbers them.
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    os.environ["XLA_FLAGS"] = " ".join(flags)
