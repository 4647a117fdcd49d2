"""What these tests share with the product's: JAX on the CPU, and the C++ library."""

from tests.conftest import collected, expert_library

__all__ = ["collected", "expert_library"]
