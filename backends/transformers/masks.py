"""Which tokens the grammars of a step's requests allow next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask, fill_next_token_bitmask_par
from torch import Tensor

from backends.grammars import Grammars

__all__ = ["Masks"]


class Masks:
    """Makes the masks of one engine; the step thread owns it.

    Args:
        grammars: where the matchers come from.
        vocab_size: how many ids the model knows.
    """

    def __init__(self, grammars: Grammars, vocab_size: int) -> None:
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._executor: LLExecutor | None = None

    def allowed(self, matchers: Sequence[LLMatcher], device: torch.device) -> Tensor:
        """Return which tokens each matcher allows next, bool `[matchers, vocab]`.

        None are where a grammar has ended, and where its matcher has failed.
        """
        tokenizer = self._grammars.tokenizer
        bits = allocate_token_bitmask(len(matchers), tokenizer.vocab_size)
        if len(matchers) == 1:
            fill_next_token_bitmask(matchers[0], bits)
        else:
            self._executor = self._executor or LLExecutor()
            numbered = [(matcher, number) for number, matcher in enumerate(matchers)]
            fill_next_token_bitmask_par(self._executor, numbered, bits)
        # on a CPU, numpy unpacks bits several times as fast as operators of torch
        unpacked = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")
        unpacked[:, tokenizer.eos_token] = 0
        return torch.from_numpy(unpacked[:, : self._vocab_size].view(np.bool_)).to(device)
