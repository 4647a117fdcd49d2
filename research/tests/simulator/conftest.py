"""Strict arithmetic, as in tests/placement."""

from tests.placement.conftest import strict_arithmetic

__all__ = ["strict_arithmetic"]
