"""Free memory of a server's devices, by which the KV cache is sized."""

from __future__ import annotations

from collections.abc import Sequence

from dance_jax.launch.preflight.probe import memory_free


def free_per_device(platform: str, machine_devices: Sequence[int]) -> int | None:
    """Free bytes on the device of this process that has the least.

    Args:
        platform: "cpu": all servers of the machine share its memory; else JAX's devices report it.
        machine_devices: number of devices of each server on this machine.

    Returns:
        None if unknown.
    """
    if platform == "cpu":
        free = memory_free()
        return None if free is None else free // sum(machine_devices)
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if not all("bytes_limit" in each for each in stats):
        return None
    return min(each["bytes_limit"] - each.get("bytes_in_use", 0) for each in stats)
