"""The notebook on SGLang runs from top to bottom in a kernel of its own."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(300)]

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "02_sglang.ipynb"


# nbclient's own event loop and sockets are not ours to tidy
@pytest.mark.filterwarnings("default::DeprecationWarning", "default::ResourceWarning")
def test_weights_change_in_flight_and_log_probs_agree(
    tiny_policy: Path, python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GYM_SDK_SGLANG_PYTHON", str(python))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("log-prob" in output.get("data", {}).get("text/html", "") for output in outputs)
    printed = "".join(output.get("text", "") for output in outputs)
    found = re.search(r"at most (\S+) apart", printed)
    assert found is not None
    assert float(found.group(1)) < 1e-4
    assert set(re.findall(r"\('(\d)', \d+\), \('\d', \d+\)", str(outputs))) == {"0", "1", "2"}
