import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from backends.tiny import ModelSizes, TinyRecipe, build_tiny_policy, cached_tiny_policy
from backends.tiny import build as build_module
from backends.tiny.build import RECIPE_FILE
from backends.tiny.model import build_model
from backends.tiny.tokenizer import build_tokenizer
from gym_sdk.errors import ConfigurationError

SMALL = TinyRecipe(
    sizes=ModelSizes(hidden_size=32, intermediate_size=32, num_hidden_layers=1, max_position_embeddings=128),
    copy_steps=1,
    trace_steps=1,
    batch_size=2,
)


def test_transformers_loads_the_folder(untrained_policy: Path) -> None:
    recipe = TinyRecipe.untrained()
    tokenizer = AutoTokenizer.from_pretrained(untrained_policy)
    model, report = AutoModelForCausalLM.from_pretrained(
        untrained_policy, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert 800_000 <= model.num_parameters() <= 4_000_000
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 2048
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id

    built = build_model(recipe, build_tokenizer(2048)).eval()
    token_ids = torch.tensor([tokenizer.encode("What is 12 + 5?")])
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, built(token_ids).logits)


def test_a_build_is_complete_and_says_what_it_is(tmp_path: Path) -> None:
    stages: list[tuple[str, float]] = []
    out = build_tiny_policy(tmp_path / "new" / "policy", SMALL, lambda *call: stages.append(call))
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        RECIPE_FILE,
    }
    assert [path.name for path in out.parent.iterdir()] == ["policy"]
    assert json.loads((out / RECIPE_FILE).read_text())["fingerprint"] == SMALL.fingerprint()
    assert stages[0] == ("tokenizer", 0.0)
    assert stages[-1] == ("saved", 1.0)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigurationError, match="exists"):
        build_tiny_policy(tmp_path, SMALL)
    with pytest.raises(ConfigurationError, match="exists"):
        build_tiny_policy(tmp_path / "mine.txt", SMALL)
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(stage: str, fraction: float) -> None:
        if stage == "traces":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_tiny_policy(tmp_path / "policy", SMALL, fail)
    assert not any(tmp_path.iterdir())


def test_the_cache_builds_once(tmp_path: Path) -> None:
    calls: list[str] = []
    first = cached_tiny_policy(SMALL, tmp_path, lambda stage, fraction: calls.append(stage))
    assert first.name == f"tiny-{SMALL.fingerprint()}"
    assert calls
    calls.clear()
    assert cached_tiny_policy(SMALL, tmp_path, lambda stage, fraction: calls.append(stage)) == first
    assert not calls
    assert cached_tiny_policy(TinyRecipe.untrained(), tmp_path) != first


def test_what_an_interrupted_build_left_is_never_used(tmp_path: Path) -> None:
    partial = tmp_path / f".tiny-{SMALL.fingerprint()}.partial-dead"
    partial.mkdir()
    (partial / "config.json").write_text("{}")
    other = tmp_path / ".tiny-another.partial-alive"
    other.mkdir()
    out = cached_tiny_policy(SMALL, tmp_path)
    assert (out / "model.safetensors").exists()
    assert not partial.exists()
    assert other.exists()


def test_the_default_cache_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cached_tiny_policy(SMALL).parent == tmp_path / "xdg" / "gym-sdk"


def test_threads_share_one_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[Path] = []
    build = build_module.build_tiny_policy

    def counting(out_dir: Path, *rest: object) -> Path:
        builds.append(out_dir)
        return build(out_dir, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(build_module, "build_tiny_policy", counting)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(cached_tiny_policy(SMALL, tmp_path))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert len(found) == 4
    assert len(set(found)) == 1


def test_processes_share_one_build(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from backends.tiny import TinyRecipe, cached_tiny_policy\n"
        "stages = []\n"
        "path = cached_tiny_policy(TinyRecipe.untrained(), sys.argv[1], lambda s, f: stages.append(s))\n"
        "assert (path / 'model.safetensors').exists()\n"
        "sys.stdout.write('built' if stages else 'found')\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sorted(outputs) == ["built", "found"]


def test_a_policy_in_the_cache_is_found_without_torch(tmp_path: Path) -> None:
    cached_tiny_policy(SMALL, tmp_path)
    code = (
        "import sys\n"
        "from backends.tiny import ModelSizes, TinyRecipe, cached_tiny_policy\n"
        "sizes = ModelSizes(hidden_size=32, intermediate_size=32, num_hidden_layers=1,"
        " max_position_embeddings=128)\n"
        "recipe = TinyRecipe(sizes=sizes, copy_steps=1, trace_steps=1, batch_size=2)\n"
        "cached_tiny_policy(recipe, sys.argv[1])\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
