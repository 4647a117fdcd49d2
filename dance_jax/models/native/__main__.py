"""Builds the library into the package: python -m dance_jax.models.native

For installations. Without this command the first start builds the library, into the cache.
"""

from __future__ import annotations

import logging
import sys

from dance_jax.models import native


def main() -> int:
    """Builds the library. Succeeds without a compiler too, because the library is optional."""
    logging.basicConfig(format="%(message)s")
    library = native.build(native.INSTALLED)
    if library is not None:
        for old in set(native.INSTALLED.glob("native-*.so")) - {library}:
            old.unlink()
        print(library)
    return 0


if __name__ == "__main__":
    sys.exit(main())
