"""The number of files and connections that this process may have open."""

from __future__ import annotations

import contextlib
import resource

#: Descriptors that are enough for any process of a launch.
ENOUGH = 65_536


def raise_limit() -> int:
    """Raise the soft limit of open descriptors to the hard limit, or to ENOUGH if that is lower.

    The usual soft limit, 1024, exists for programs that use select(2). A server needs a descriptor
    for each connection.

    Returns:
        The soft limit now.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= ENOUGH:
        return ENOUGH
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    # macOS refuses more than a limit of its kernel.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
