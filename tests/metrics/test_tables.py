"""Tables by tag and of rollouts, as text, HTML, Markdown and dicts."""

from __future__ import annotations

import pytest
from support.scored import group_of, scored

from gym_sdk.metrics import Table, group_table, rollout_table, tags_of
from gym_sdk.schema import Failure, Outcome, Stage, Task, Truncation


def tagged(name: str, **metadata: object) -> Task:
    return Task("question", id=name, metadata=metadata)


def test_a_row_for_each_tag_and_one_for_all() -> None:
    groups = [
        group_of([1.0, 1.0, None], task=tagged("a", tags=["sum", "easy"])),
        group_of([0.0, 1.0, 0.0], task=tagged("b", tags=["sum"])),
        group_of([None], task=tagged("c")),
    ]
    rows = {row["name"]: row for row in group_table(groups, ks=(1, 3)).to_dicts()}
    assert list(rows) == ["(none)", "easy", "sum", "all"]
    assert rows["sum"] == {
        "name": "sum",
        "tasks": 2,
        "rollouts": 6,
        "scored": 5,
        "reward": pytest.approx(3 / 5),
        "error": pytest.approx(rows["all"]["error"]),
        "pass@1": pytest.approx((1 + 1 / 3) / 2),
        "pass@3": 1.0,  # of the only group with three rewards
        "failed": 0,
    }
    assert rows["(none)"]["reward"] is None
    assert rows["easy"]["error"] is None
    assert (rows["all"]["tasks"], rows["all"]["rollouts"]) == (3, 7)


def test_other_keys_split_too() -> None:
    groups = [group_of([1.0], task=tagged(str(n), level=n % 2)) for n in range(4)]
    table = group_table(groups, by=lambda task: f"level {task.metadata['level']}")
    assert [(row[0], row[1]) for row in table.rows] == [("level 0", 2), ("level 1", 2), ("all", 4)]
    twice = group_table(groups, by=lambda task: ["x", "x"])
    assert [(row[0], row[1]) for row in twice.rows] == [("x", 4), ("all", 4)]
    assert len(group_table([])) == 1


def test_tags_are_texts() -> None:
    assert tags_of(tagged("a", tags="one")) == ("one",)
    assert tags_of(tagged("a", tags=["one", 2])) == ("one", "2")
    assert tags_of(tagged("a", tags=None)) == ()
    assert tags_of(tagged("a")) == ()


def test_what_a_table_looks_like() -> None:
    table = Table(("name", "<b>"), (("a|b", 0.123456), ("<i>", None)), note="one & two")
    assert str(table) == "name  <b>\n----  ------\na|b   0.1235\n<i>   -\none & two"
    assert table.to_markdown() == (
        "| name | <b> |\n| --- | --- |\n| a\\|b | 0.1235 |\n| <i> | - |\n\none & two"
    )
    html = table._repr_html_()
    assert "<th>&lt;b&gt;</th>" in html
    assert "<td>&lt;i&gt;</td><td>-</td>" in html
    assert "<p>one &amp; two</p>" in html
    assert repr(table) == "<Table of 2 rows: name, <b>>"


def test_rollouts_as_rows() -> None:
    failure = Failure(error="DeadlineError", message="too late", where=Stage.TOOL)
    rollouts = [
        scored(0.5, "a\n long " + "text " * 50, outcome=Outcome.TRUNCATED, truncation=Truncation.TOKENS),
        scored(None, "half", outcome=Outcome.FAILED, failure=failure, index=1),
        scored(1.0),
    ]
    table = rollout_table(rollouts, limit=2, width=20)
    first, second = table.to_dicts()
    assert first["outcome"] == "truncated (tokens)"
    assert first["answer"] == "a long text text te…"
    assert (second["reward"], second["answer"], second["#"]) == (None, "DeadlineError: too …", 1)
    assert table.note == "... and 1 more"
    assert rollout_table(rollouts).note == ""
