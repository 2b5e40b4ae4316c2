"""The page on measured routing says what is computed."""

import re

import pytest

from perfmodel.placing.compare import compare
from perfmodel.placing.study_page import DOMAINS, MODELS, asked, carried, recording
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "placement-study.md").read_text(encoding="utf-8")


def rows(section: str) -> dict[str, list[str]]:
    """The first table after some words, by its first column."""
    lines = PAGE[PAGE.index(section) :].split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    table = [line.strip("| ").split(" | ") for line in lines[first:]]
    cells = [row for row in table[: next(i for i, row in enumerate(table) if len(row) < 2)] if "---" not in row]
    return {row[0].strip("*"): row[1:] for row in cells}


@pytest.mark.parametrize("policy", ["frequency", "uniform", "lru"])
def test_slowdowns_of_policies_are_those_that_are_computed(policy: str) -> None:
    found = rows("## gh200, zero-copy")
    for column, shape in ((2, "olmoe"), (5, "mixtral-8x7b")):
        question = asked("gh200", "zero-copy", shape, MODELS[shape], 16, (0.25, 0.5, 0.75)[(column - 1) % 3])
        assert f"{compare(question, (policy,))[0].slowdown:.2f}" == found[policy][column - 1]


def test_what_other_texts_cost_is_computed_and_more_than_the_own() -> None:
    found = rows("## Does a placement hold on other texts?")
    assert list(found)[1:-1] == list(DOMAINS)
    assert found["no popularity"] == [f"{carried('uniform')['wikipedia'][name]:.2f}" for name in DOMAINS]
    own, away = re.findall(r"(\d\.\d\d)x on average, on the others (\d\.\d\d)x", PAGE)[0]
    assert float(own) < float(away)


def test_the_recording_is_that_of_three_layers() -> None:
    assert recording(MODELS["olmoe"]).loads.shape == (1, 3, 64)
    assert recording(MODELS["mixtral-8x7b"]).loads.shape == (1, 3, 8)
