"""The pages of the documentation that show other packages: their lines run as they stand."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

from invfunc.nn.residual import RECIPES

PAGES = Path(__file__).parents[2] / "docs" / "how-to"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["your-stack", "wrap-a-flow"])
def test_the_lines_of_a_page_run(name: str) -> None:
    torch.set_default_dtype(torch.float32)
    blocks = re.findall(r"```python\n(.*?)```", (PAGES / f"{name}.md").read_text(), re.DOTALL)
    lines = "\n".join(block for block in blocks if not block.startswith(">>>"))
    exec(compile(lines, name, "exec"), {"__name__": name})


def test_the_table_of_families_names_the_recipes_and_no_others() -> None:
    rows = re.findall(r"^\|.*\| (`.*`) \|$", (PAGES / "your-stack.md").read_text(), re.MULTILINE)
    named = re.findall(r"`(\w+)`", " ".join(rows))
    assert sorted(named) == sorted({path.rpartition(".")[2] for path in RECIPES})


@pytest.mark.parametrize("path", RECIPES)
def test_a_recipe_is_for_a_class_that_there_is(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert issubclass(getattr(import_module(module), name), torch.nn.Module)
