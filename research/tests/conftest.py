"""What these tests share with the product's: JAX on the CPU, and strict arithmetic."""

from tests.conftest import collected, expert_library
from tests.placement.conftest import short, strict_arithmetic

__all__ = ["collected", "expert_library", "short", "strict_arithmetic"]
