"""The example of `docs/losses.md` runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch

DOCS = Path(__file__).parents[3] / "docs" / "losses.md"


def test_the_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, str(DOCS), "exec"), names)
    log_probs, mask = names["log_probs"], names["mask"]
    assert isinstance(log_probs, torch.Tensor)
    assert log_probs.grad is not None
    assert isinstance(mask, torch.Tensor)
    assert torch.equal(log_probs.grad != 0, mask)
