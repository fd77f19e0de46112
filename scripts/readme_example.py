"""Prints the README's Python example, for CI to run."""

import re
from pathlib import Path

readme = Path(__file__).resolve().parent.parent / "README.md"
match = re.search(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
if match is None:
    raise SystemExit("README.md has no Python example")
print(match[1])
