"""What the README files say: their size, their names of functions and files, nothing left to fill in."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [path for path in ROOT.rglob("README.md") if not any(part.startswith(".") for part in path.parts)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_has_no_gap_and_no_broken_link(page):
    text = page.read_text()
    assert not re.search(r"\b[A-Z]+_(RESULTS?|TABLE|TIME)\b|TO BE FILLED|to be filled", text, flags=0)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_readme_is_short_and_shows_a_picture_first():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 10 * 1024
    assert text.index("![") < text.index("## ")


def test_every_name_in_the_map_of_the_paper_exists():
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| paper | code |") :].split("\n\n")[0]
    names = re.findall(r"`([\w./]+)", table)
    assert len(names) > 15
    homes = {
        "Motion": "motion",
        "UNet": "networks.unet",
        "SVD": "svd",
        "SpatioTemporalTransformer": "networks.attention",
    }
    homes |= {"CrossAttention": "networks.attention", "animate": "pipeline"}
    for name in names:
        if "/" in name:
            assert (ROOT / "minimti" / name).exists(), name
            continue
        first, *rest = name.split(".")
        module = importlib.import_module(f"minimti.{homes.get(first, first)}")
        found = getattr(module, first) if first in homes else module
        for attribute in rest:
            found = getattr(found, attribute)
