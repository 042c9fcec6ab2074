"""Model folders in the Hugging Face layout, written so that a reader never sees half of one."""

from __future__ import annotations

import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

__all__ = ["copy_tokenizer", "new_folder", "previous_of", "quiet", "save_model"]

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
_BAR = threading.Lock()


def previous_of(path: Path) -> Path:
    """Return where a folder's predecessor lies while it is being replaced."""
    return path.with_name(f".{path.name}.previous")


@contextmanager
def new_folder(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` when the block ends without an error.

    If there is a folder at `path`, it is moved to `previous_of(path)` first and removed at the end; a kill
    between the two renames leaves it there. A kill before them leaves `.{name}.*.partial` beside it. If the
    block raises, or its files cannot be written through, `path` is as before.

    Args:
        path: the folder to make or to replace; its parents are made.
        durable: whether everything is written through to the disk before the renames, and they too before
            this returns.
    """
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        yield partial
        if durable:
            for entry in (*partial.rglob("*"), partial, *(parent.parent for parent in made)):
                _write_through(entry)
        previous = previous_of(path)
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
            path.replace(previous)
        partial.replace(path)
        if durable:
            _write_through(path.parent)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write config and weights (safetensors) into an existing folder."""
    with quiet():
        model.save_pretrained(folder)
    mode = (folder / "config.json").stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)  # safetensors lets its owner alone read them, and an engine may be somebody else's


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files and the chat template beside a model."""
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copy2(file, folder / file.name)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' progress bars inside: a weight sync at each step would fill the terminal."""
    # The switch belongs to the process, so those who turn it take turns.
    with _BAR:
        shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            if shown:
                transformers_logging.enable_progress_bar()


def _write_through(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
