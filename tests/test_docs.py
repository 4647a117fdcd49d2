"""docs/add-a-model.md shows the real files."""

from __future__ import annotations

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def test_the_example_of_a_family_is_the_real_one() -> None:
    text = (ROOT / "docs" / "add-a-model.md").read_text(encoding="utf-8")
    families = ROOT / "dance_jax" / "models" / "families"
    example, line, names = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert example == (families / "olmoe.py").read_text(encoding="utf-8")
    assert line in (families / "__init__.py").read_text(encoding="utf-8")
    assert names in (families / "mixtral.py").read_text(encoding="utf-8")
