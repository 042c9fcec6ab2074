"""Third-party progress bars that would spoil a command's own output."""

from __future__ import annotations

__all__ = ["quiet_transformers"]


def quiet_transformers() -> None:
    """Hide transformers' bars for loading and saving weights, for the rest of this process."""
    from transformers.utils import logging

    logging.disable_progress_bar()
