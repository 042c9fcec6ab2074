"""Which renderer serves a model, and what is said of what it cannot do."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from support.template_tokenizers import template_tokenizer
from support.templates import trl_templates

from backends.renderers import RenderingConfig, load_renderer
from backends.rendering import TemplateRenderer
from backends.rendering.families import FamilyRenderer
from backends.rendering.renderer import Conversation
from gym_sdk.cli import main
from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import Message

GEMMA = [f"<{name}>" for part in ("image", "audio") for name in (f"|{part}", f"{part}|", f"|{part}|")]
"""What the Gemma 4 family's renderer asks of a tokenizer beside what the template shows."""
GEMMA += ["<|video|>", "<|think|>"]


def model(folder: Path, name: str, *, template: str = "", **config: Any) -> Path:
    """Write a model folder with the tokenizer of a real template."""
    tokenizer = template_tokenizer(name, template or trl_templates()[name])
    tokenizer.add_tokens(["<bos>", "<eos>", *GEMMA], special_tokens=True)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", **config}))
    return folder


def test_a_template_that_can_everything_is_quiet(
    untrained_policy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        renderer = load_renderer(untrained_policy, RenderingConfig())
    assert isinstance(renderer, TemplateRenderer)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "tools bridge" in record.getMessage()


def test_calls_that_no_parser_reads_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    renderer = load_renderer(
        model(tmp_path, "gemma4_v5"), RenderingConfig(renderer="template", parser="none")
    )
    assert isinstance(renderer, TemplateRenderer)
    assert "tools" in caplog.text
    assert "parser" in caplog.text


def test_a_family_stands_in_where_the_template_cannot(tmp_path: Path) -> None:
    folder = model(tmp_path, "gemma4", _name_or_path="google/gemma-4-E2B-it")
    assert isinstance(load_renderer(folder, RenderingConfig(parser="none")), FamilyRenderer)
    template = RenderingConfig(renderer="template", parser="none")
    assert isinstance(load_renderer(folder, template), TemplateRenderer)
    assert isinstance(load_renderer(folder, RenderingConfig()), TemplateRenderer)  # our own parser reads them


def test_a_fine_tuned_model_with_another_template_is_not_taken_for_its_base(tmp_path: Path) -> None:
    other = (
        trl_templates()["gemma4"].replace("<|turn>user", "<|turn>human").replace("'<|turn>'", "'<|turn>x'")
    )
    assert other != trl_templates()["gemma4"]
    folder = model(tmp_path, "gemma4", template=other, _name_or_path="google/gemma-4-E2B-it")
    assert isinstance(load_renderer(folder, RenderingConfig(parser="none")), TemplateRenderer)


def test_without_the_package_the_template_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path, "gemma4", _name_or_path="google/gemma-4-E2B-it")
    for module in [name for name in sys.modules if name.partition(".")[0] == "renderers"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "renderers", None)
    assert isinstance(load_renderer(folder, RenderingConfig(parser="none")), TemplateRenderer)
    with pytest.raises(ConfigurationError, match=r"gym-sdk\[renderers\]"):
        load_renderer(folder, RenderingConfig(renderer="gemma4"))


def test_unknown_renderers_and_parsers_are_named(untrained_policy: Path) -> None:
    with pytest.raises(ConfigurationError, match="qwen3"):
        load_renderer(untrained_policy, RenderingConfig(renderer="gpt-5"))
    with pytest.raises(ConfigurationError, match="hermes"):
        load_renderer(untrained_policy, RenderingConfig(renderer="template", parser="xml"))


def test_thinking_is_kept_by_the_templates_own_switch(tmp_path: Path) -> None:
    folder = model(tmp_path, "qwen3_6")
    kept = load_renderer(folder, RenderingConfig())
    left = load_renderer(folder, RenderingConfig(thinking="template"))
    assert isinstance(kept, TemplateRenderer)
    assert isinstance(left, TemplateRenderer)
    assert kept.template_kwargs == {"preserve_thinking": True}
    assert left.template_kwargs == {}
    asked = RenderingConfig(template_kwargs={"preserve_thinking": False, "enable_thinking": False})
    own = load_renderer(folder, asked)
    assert isinstance(own, TemplateRenderer)
    assert own.template_kwargs == {"preserve_thinking": False, "enable_thinking": False}
    user = Conversation([Message(role="user", content="q")])
    assert own.render(user).token_ids != kept.render(user).token_ids


def test_the_check_command_tells_what_works(
    untrained_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(untrained_policy)]) == 0
    shown = capsys.readouterr().out
    assert "parser hermes, turns end with <|im_end|>" in shown
    assert "parallel   bridge" in shown
    folder = model(tmp_path, "gemma4")
    assert main(["check", str(folder)]) == 0
    assert main(["check", str(folder), "--parser", "none"]) == 1
    assert "problem: tools" in capsys.readouterr().out
    assert main(["check", str(folder), "--renderer", "gemma4"]) == 1
    assert "--renderer template" in capsys.readouterr().err


def test_template_settings_of_the_command_line_must_be_an_object(
    untrained_policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in ("[1]", "{"):
        with pytest.raises(SystemExit):
            main(["check", str(untrained_policy), "--template-kwargs", wrong])
    assert "must be a JSON object" in capsys.readouterr().err
