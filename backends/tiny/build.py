"""Build a tiny policy into a folder, or find it in the cache."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeAlias

from backends.tiny.recipe import TinyRecipe
from gym_sdk.errors import ConfigurationError

__all__ = ["RECIPE_FILE", "Progress", "build_tiny_policy", "cached_tiny_policy"]

Progress: TypeAlias = Callable[[str, float], None]
"""Called with the stage's name and the fraction of the whole that is done, in [0, 1]."""

RECIPE_FILE = "tiny_recipe.json"
"""Says, inside the folder, what the policy was made from."""


def build_tiny_policy(
    out_dir: str | Path, recipe: TinyRecipe | None = None, progress: Progress | None = None
) -> Path:
    """Build a tiny policy: tokenizer, chat template and warm-started weights in the Hugging Face layout.

    The folder appears complete or not at all.

    Args:
        out_dir: must not exist yet, or be empty.
        recipe: the default one takes about a minute on 2 cores.
        progress: told how far it is.

    Raises:
        ConfigurationError: `out_dir` exists and is not an empty folder.
    """
    out = Path(out_dir).expanduser().absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigurationError(f"{out} exists already: choose a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f"{_partial_prefix(out)}{uuid.uuid4().hex}"
    partial.mkdir()
    try:
        _build_into(partial, recipe or TinyRecipe(), progress or _silent)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def cached_tiny_policy(
    recipe: TinyRecipe | None = None, cache_dir: str | Path | None = None, progress: Progress | None = None
) -> Path:
    """Return the folder of a recipe's policy, and build it first if it is not there.

    When several processes want the same policy, one builds it and the others wait for it.

    Args:
        recipe: what to build.
        cache_dir: where policies are kept; by default `gym-sdk` in `$XDG_CACHE_HOME` or `~/.cache`.
        progress: told how far a build is; not called if the policy is there.
    """
    recipe = recipe or TinyRecipe()
    cache = Path(cache_dir) if cache_dir is not None else _default_cache_dir()
    cache = cache.expanduser().absolute()
    out = cache / f"tiny-{recipe.fingerprint()}"
    if out.exists():
        return out
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{out.name}.lock"):
        if not out.exists():
            for abandoned in cache.glob(f"{_partial_prefix(out)}*"):
                shutil.rmtree(abandoned, ignore_errors=True)
            build_tiny_policy(out, recipe, progress)
    return out


def _build_into(folder: Path, recipe: TinyRecipe, progress: Progress) -> None:
    # Imported here, so that finding a policy in the cache does not cost loading torch.
    from backends.tiny.model import build_model
    from backends.tiny.tokenizer import build_tokenizer
    from backends.tiny.warm_start import warm_start

    progress("tokenizer", 0.0)
    tokenizer = build_tokenizer(recipe.sizes.max_position_embeddings, recipe.mix.vocabulary)
    model = build_model(recipe, tokenizer)
    warm_start(model, tokenizer, recipe, progress)
    tokenizer.save_pretrained(folder)
    with _without_progress_bars():
        model.save_pretrained(folder)
    content = {"fingerprint": recipe.fingerprint(), "family": recipe.mix.family, **asdict(recipe)}
    (folder / RECIPE_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    progress("saved", 1.0)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing its own bar into the caller's progress."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _partial_prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _silent(stage: str, fraction: float) -> None:
    """Tell nobody."""


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gym-sdk"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; the system releases it if this one dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
