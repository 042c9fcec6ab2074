"""Efforts of reasoning as template settings, on real templates."""

from __future__ import annotations

from typing import Any

import pytest
from support.template_tokenizers import renderers

from backends.rendering.effort import EFFORTS, effort_settings
from gym_sdk.errors import PolicyError

ON, OFF = {"enable_thinking": True}, {"enable_thinking": False}
SWITCHED: dict[str, dict[str, Any]] = {effort: OFF if effort == "none" else ON for effort in EFFORTS}
TEMPLATES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": SWITCHED,
    "qwen3": SWITCHED,
    "glm4moe": SWITCHED,
    "gptoss": {effort: {"reasoning_effort": effort} for effort in ("low", "medium", "high")},
    "qwen3_8": {
        "none": OFF,
        **{effort: {**ON, "reasoning_effort": effort} for effort in ("low", "medium", "xhigh")},
    },
    "nemotron_3_super": {**SWITCHED, "low": {**ON, "low_effort": True}},
    "llama3_1": {},
    "gemma": {},
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_efforts_are_settings_or_refused(name: str) -> None:
    template = renderers()[name].template
    for effort in EFFORTS:
        expected = TEMPLATES[name].get(effort)
        if expected is not None:
            assert effort_settings(template, effort) == expected
            continue
        with pytest.raises(PolicyError) as caught:
            effort_settings(template, effort)
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "reasoning.effort")


def test_what_is_no_effort_is_refused() -> None:
    with pytest.raises(PolicyError, match="choose one of") as caught:
        effort_settings(renderers()["tiny"].template, "extreme")
    assert caught.value.param == "reasoning.effort"
