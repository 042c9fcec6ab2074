from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gym_sdk.environments import iter_tasks, load_tasks, save_tasks
from gym_sdk.errors import DatasetError, GymError
from gym_sdk.schema import Message, Task


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tasks.jsonl"


def test_fields(path: Path) -> None:
    items = [{"role": "user", "content": "q3"}]
    write(
        path,
        {"input": "q1", "answer": 5, "id": "a", "instructions": "i", "settings": {"temperature": 0.5}},
        b"",
        {"prompt": "q2", "id": 7, "metadata": {"tags": ["x"]}, "level": 3},
        b"  \r",
        {"question": items, "expected_answer": ["x"], "metadata": None, "id": None, "instructions": None},
        {"input": "q4", "answer": None},
    )
    assert load_tasks(path) == [
        Task("q1", answer=5, id="a", instructions="i", settings={"temperature": 0.5}),
        Task("q2", id="7", metadata={"tags": ["x"], "level": 3}),
        Task(items, answer=["x"]),
        Task("q4"),
    ]
    assert load_tasks(str(path)) == load_tasks(path)


def test_the_form_of_nemo_gym(path: Path) -> None:
    row: dict[str, Any] = {
        "responses_create_params": {
            "input": [{"role": "user", "content": "What is 2 + 3?"}],
            "instructions": "Use the tool.",
            "tools": [{"type": "function", "name": "add", "parameters": {}, "strict": True}],
            "parallel_tool_calls": False,
        },
        "expected_answer": "5",
        "question": "kept",
        "agent_ref": {"name": "simple"},
    }
    (task,) = load_tasks(write(path, row))
    assert task == Task(
        row["responses_create_params"]["input"],
        answer="5",
        instructions="Use the tool.",
        settings={"tools": row["responses_create_params"]["tools"], "parallel_tool_calls": False},
        metadata={"question": "kept", "agent_ref": {"name": "simple"}},
    )


GOOD = {"input": "q"}


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        (b"{", None, "is not JSON: EOF while parsing an object at column 1"),
        (b'{"input": "q",}', None, "is not JSON: trailing comma"),
        (b'{"input": NaN}', None, "is not JSON"),
        (b'{"input": "\\ud800"}', None, "is not JSON"),
        (b'{"input": "\xff"}', None, "is not UTF-8: byte 12 of the line"),
        (b"[1]", None, "is a list, not a JSON object"),
        (b"3", None, "is a number, not a JSON object"),
        (b'"text"', None, "is text, not a JSON object"),
        (b"null", None, "is null, not a JSON object"),
        ({}, "input", "has no `input`"),
        ({"answer": "5"}, "input", r"has no `input` \(nor `prompt` or `question`\)"),
        ({"input": None}, "input", "`input` must be text or a list of items, not null"),
        ({"prompt": 3}, "prompt", "`prompt` must be text or a list of items, not a number"),
        ({"input": []}, "input", "`input` is an empty list"),
        ({"input": [{"role": "user"}]}, "input.0.message.content", "Field required"),
        ({"input": [{"role": "wizard", "content": ""}]}, "input.0.message.role", "Input should be 'user'"),
        ({"input": ["x"]}, "input.0", "an item needs a `type`"),
        ({"input": "q", "prompt": "p"}, "prompt", "has both `input` and `prompt`"),
        ({"input": "q", "answer": 1, "expected_answer": 2}, "expected_answer", "has both"),
        ({"input": "q", "id": 1.5}, "id", "`id` must be text or an integer, not a number"),
        ({"input": "q", "id": True}, "id", "not a boolean"),
        ({"input": "q", "id": ""}, "id", "not empty text"),
        ({"input": "q", "instructions": ["x"]}, "instructions", "`instructions` must be text, not a list"),
        ({"input": "q", "settings": "x"}, "settings", "`settings` must be an object, not text"),
        ({"input": "q", "metadata": []}, "metadata", "`metadata` must be an object, not a list"),
        ({"input": "q", "level": 1, "metadata": {"level": 2}}, "level", "`level` stands twice"),
        ({"responses_create_params": 3}, "responses_create_params", "must be an object"),
        ({"responses_create_params": {}}, "input", "has no `input`"),
        ({"responses_create_params": {"input": "a"}, "input": "b"}, "input", "`input` stands twice"),
    ],
)
def test_errors_name_file_line_and_field(path: Path, row: Any, field: str | None, message: str) -> None:
    write(path, GOOD, b"", row, GOOD)
    with pytest.raises(DatasetError, match=rf"^{path}:3: .*{message}") as caught:
        load_tasks(path)
    assert (caught.value.path, caught.value.line, caught.value.field) == (str(path), 3, field)


def test_duplicate_ids(path: Path) -> None:
    write(path, {"input": "a", "id": "1"}, {"input": "b", "id": "2"}, {"input": "c", "id": 1})
    with pytest.raises(DatasetError, match=r":3: `id` '1' is already the id of line 1"):
        load_tasks(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"missing.jsonl: cannot be read: No such file"):
        load_tasks(tmp_path / "missing.jsonl")
    with pytest.raises(DatasetError, match="cannot be read: Is a directory"):
        load_tasks(tmp_path)
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(b"not compressed")
    with pytest.raises(DatasetError, match="cannot be read: Not a gzipped file"):
        load_tasks(broken)
    broken.write_bytes(gzip.compress(b'{"input": "q"}\n' * 1_000)[:-10])
    with pytest.raises(DatasetError, match="cannot be read"):
        load_tasks(broken)


def test_tasks_before_a_bad_line_are_not_lost(path: Path) -> None:
    write(path, GOOD, GOOD, b"{")
    tasks = iter_tasks(path)
    assert [next(tasks), next(tasks)] == [Task("q"), Task("q")]
    with pytest.raises(DatasetError):
        next(tasks)


def test_an_empty_file_and_a_byte_order_mark(path: Path) -> None:
    path.write_bytes(b"")
    assert load_tasks(path) == []
    path.write_bytes(b'\xef\xbb\xbf{"input": "q"}\r\n')
    assert load_tasks(path) == [Task("q")]


@pytest.mark.parametrize("name", ["tasks.jsonl", "tasks.jsonl.gz"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    tasks = [
        Task("q", answer={"x": [1, None]}, id="a", instructions="i", settings={"seed": 1}, metadata={"m": 1}),
        Task([{"role": "user", "content": "é", "extra": 1}], answer=False),
        Task("\u2028 line"),
    ]
    save_tasks(tmp_path / name, iter(tasks))
    assert load_tasks(tmp_path / name) == tasks
    save_tasks(tmp_path / name, [Task([Message(role="user", content="q")])])
    assert load_tasks(tmp_path / name) == [Task([{"type": "message", "role": "user", "content": "q"}])]
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda child: st.lists(child) | st.dictionaries(st.text("abc"), child),
    max_leaves=6,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answer=_json, metadata=st.dictionaries(st.text("abcinput"), _json))
def test_any_json_survives(path: Path, answer: Any, metadata: dict[str, Any]) -> None:
    task = Task("q", answer=answer, metadata=metadata)
    save_tasks(path, [task])
    assert load_tasks(path) == [task]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary() | st.text('{}[]":,input0 \n').map(str.encode))
def test_any_bytes_are_tasks_or_a_dataset_error(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        load_tasks(path)
    except GymError as error:
        assert isinstance(error, DatasetError)  # noqa: PT017


@pytest.mark.parametrize(
    ("task", "field"),
    [
        (Task("q", answer=object()), "answer"),
        (Task("q", answer=float("nan")), "answer"),
        (Task("q", metadata={"m": {1: lambda: 0}}), "metadata"),
        (Task("q", metadata={"m": float("inf")}), "metadata"),
        (Task("\ud800"), "input"),
    ],
)
def test_what_is_not_json_cannot_be_saved(path: Path, task: Task, field: str) -> None:
    write(path, GOOD)
    with pytest.raises(DatasetError, match=f"jsonl:2: `{field}` is not JSON") as caught:
        save_tasks(path, [Task("q"), task])
    assert (caught.value.line, caught.value.field) == (2, field)
    assert load_tasks(path) == [Task("q")]  # what was there is still there
    assert len(list(path.parent.iterdir())) == 1


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot be written: No such file"):
        save_tasks(tmp_path / "no" / "tasks.jsonl", [])
