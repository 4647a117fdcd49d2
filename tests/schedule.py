"""How pytest-xdist spreads the test files over its workers."""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadFileScheduling

#: The files that take longest, by the beginnings of their paths, and the group of each. They come
#: first, so that no worker is left alone with one at the end. One worker runs a whole group, whose
#: files use the same processes or compile the same functions: they start and compile once.
LONGEST = {
    "tests/cluster/": "three_servers",
    "tests/serve/test_cluster.py": "served",
    "tests/serve/test_migration.py": "served",
    "tests/serve/test_restart.py": "served",
    "tests/serve/test_dashboard.py": "served",
    "tests/placement/": "placement",
    "tests/launch/test_cluster.py": "",
    "tests/serve/test_loss.py": "",
    "tests/models/test_parity.py": "",
    "tests/launch/test_nodes.py": "",
    "tests/launch/test_remote.py": "",
    "tests/test_llm.py": "",
    "tests/serve/test_openai": "local_server",
    "tests/serve/test_client_libraries.py": "local_server",
    "tests/serve/test_resume.py": "local_server",
}


def _place(path: str) -> int:
    """Index in `LONGEST` of the entry for a file; behind all entries without one."""
    entries = enumerate(LONGEST)
    return next((n for n, start in entries if path.startswith(start)), len(LONGEST))


def longest_first(items: list[pytest.Item]) -> None:
    """Orders the tests; those of a file stay in their order."""
    items.sort(key=lambda item: _place(item.nodeid))


class Schedule(LoadFileScheduling):
    """Gives the workers whole files or groups, in the order of the tests."""

    def __init__(self, config: pytest.Config, log: object) -> None:
        super().__init__(config, log)  # type: ignore[arg-type]
        # By default, files with many tests come first, however short these are.
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        groups = (group for start, group in LONGEST.items() if nodeid.startswith(start))
        return next(groups, "") or super()._split_scope(nodeid)
