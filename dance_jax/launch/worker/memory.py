"""How much memory a server's devices have left, for what is sized by it: the KV cache."""

from __future__ import annotations

from collections.abc import Sequence

from dance_jax.launch.preflight.probe import memory_free


def free_per_device(platform: str, machine_devices: Sequence[int]) -> int | None:
    """Bytes that nothing uses yet, on the device of this process that has least.

    Args:
        platform: "cpu": all servers of the machine share its memory; else JAX's devices say.
        machine_devices: devices of each server on this machine.

    Returns:
        None where nobody says.
    """
    if platform == "cpu":
        free = memory_free()
        return None if free is None else free // sum(machine_devices)
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if not all("bytes_limit" in each for each in stats):
        return None
    return min(each["bytes_limit"] - each.get("bytes_in_use", 0) for each in stats)
