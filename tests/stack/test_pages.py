"""The pages of the documentation that show other packages: their lines run as they stand."""

import re
from pathlib import Path

import pytest
import torch

PAGES = Path(__file__).parents[2] / "docs" / "how-to"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["your-stack", "wrap-a-flow"])
def test_the_lines_of_a_page_run(name: str) -> None:
    torch.set_default_dtype(torch.float32)
    blocks = re.findall(r"```python\n(.*?)```", (PAGES / f"{name}.md").read_text(), re.DOTALL)
    lines = "\n".join(block for block in blocks if not block.startswith(">>>"))
    exec(compile(lines, name, "exec"), {"__name__": name})
