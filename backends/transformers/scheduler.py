"""Continuous batching: who runs, what the next forward pass computes, and what came of it."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import torch
from transformers import PreTrainedModel

from backends.engine import FinishReason, PauseMode
from backends.transformers.attention import Segment, StepBatch
from backends.transformers.cache import SlotCache
from backends.transformers.config import EngineConfig
from backends.transformers.draw import draw, failure
from backends.transformers.masks import Masks
from backends.transformers.request import Output, RequestState
from backends.transformers.slots import Match, SlotTable
from gym_sdk.errors import GymError

__all__ = ["Scheduler"]

_FIRST_ROWS = 16
_FIRST_WIDTH = 128


class Scheduler:
    """Runs requests over one module, a step at a time. Not thread-safe: the step thread owns it.

    One step is one forward pass: one token of every request that is ready, and up to
    `EngineConfig.prefill_tokens` prompt tokens of those that are not. A prompt's last token goes through
    the same path as a sampled one, so prefill needs no logits, and a request whose cache is lost simply
    has more to prefill.

    Args:
        module: from `slot_module`.
        config: sizes and limits.
        masks: says what the grammars of requests allow.
        context_length: most tokens in a row.
        version: the label of the module's weights.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        config: EngineConfig,
        masks: Masks,
        *,
        context_length: int,
        version: str,
    ) -> None:
        self.module = module
        self.config = config
        self.masks = masks
        self.context_length = context_length
        self.version = version
        self.waiting: deque[RequestState] = deque()
        self.running: dict[str, RequestState] = {}
        self.device = module.device
        self._table = SlotTable(SlotCache(self.device))
        self._least_width = _FIRST_WIDTH

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running)

    def add(self, state: RequestState) -> None:
        """Put a new request in line."""
        if not self.has_work:
            self._least_width = _FIRST_WIDTH
        self.waiting.append(state)

    def abort(self, state: RequestState) -> list[Output]:
        """End one request where it is; without effect if it has ended."""
        if self.running.get(state.request_id) is state:
            return self._finish(state, FinishReason.ABORT)
        if state in self.waiting:
            self.waiting.remove(state)
            return _listed(state.output(self.version, FinishReason.ABORT))
        return []

    def abort_all(self) -> list[Output]:
        """End every request, running or waiting."""
        outputs = self._abort_running()
        for state in self.waiting:
            outputs += _listed(state.output(self.version, FinishReason.ABORT))
        self.waiting.clear()
        return outputs

    def discard(self) -> None:
        """Forget every request without a word, and free the cache."""
        self.running.clear()
        self.waiting.clear()
        self._table.clear()

    def pause(self, mode: PauseMode) -> list[Output]:
        """Prepare for a pause: what happens to running requests is the mode's choice."""
        if mode == "abort":
            return self._abort_running()
        if mode == "retract":
            self.retract()
        return []

    def retract(self) -> None:
        """Send every running request back to the head of the line, and forget all keys and values."""
        for state in reversed(self.running.values()):
            state.row = None
            self.waiting.appendleft(state)
        self.running.clear()
        self._table.clear()

    def step(self) -> list[Output]:
        """Run one forward pass and sample one token of every request that is ready."""
        self._admit()
        table = self._table
        decoding = table.gather_ready()
        segments = self._segments() if decoding < len(self.running) else []
        if not decoding and not segments:
            return []
        batch = StepBatch(table.cache, table.known[:decoding] - 1, segments)
        token_ids = torch.from_numpy(table.tokens[batch.rows, batch.places]).to(self.device)
        logits = self.module(
            input_ids=token_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            logits_to_keep=torch.arange(decoding, device=self.device),
            slot_batch=batch,
        ).logits[0]
        table.valid[:decoding] = table.known[:decoding]
        for segment in segments:
            table.valid[segment.row] = segment.end
        return self._sample(logits, decoding) if decoding else []

    def _sample(self, logits: torch.Tensor, decoding: int) -> list[Output]:
        table, ready = self._table, slice(0, decoding)
        drawn = draw(logits, table, self.masks)
        table.tokens[np.arange(decoding), table.known[ready]] = drawn.tokens.numpy()
        table.known[ready] += 1
        table.sampled[ready] += 1
        outputs: list[Output] = []
        version = self.version
        # a request that ends leaves the table: the owners are those of before
        rows = zip(table.owners[ready], drawn.tokens.tolist(), drawn.log_probs, strict=True)
        for row, (state, token_id, log_prob) in enumerate(rows):
            assert state is not None
            if not math.isfinite(log_prob) or not state.continues(token_id):
                outputs += self._fail(state, failure(state, log_prob, version))
                continue
            reason = state.append(token_id, log_prob, version, drawn.top_log_probs.get(row))
            if reason is not None:
                outputs += self._finish(state, reason)
            elif state.sink.streaming:
                outputs += _listed(state.output(version))
        return outputs

    def _segments(self) -> list[Segment]:
        """Choose the prompt tokens to compute in this step, first come, first served."""
        table, budget = self._table, self.config.prefill_tokens
        segments = []
        for state in self.running.values():
            row = state.row
            assert row is not None
            start, end = int(table.valid[row]), int(table.known[row]) - 1
            if start < end and budget:
                end = min(end, start + budget)
                segments.append(Segment(row, start, end))
                budget -= end - start
        return segments

    def _admit(self) -> None:
        """Give slots to waiting requests, with whatever keys and values can be reused."""
        if self.running:
            self._make_width(1 + int(self._table.known.max()))
        copies: dict[int, int] = {}
        deferred: list[RequestState] = []
        awaited: set[bytes] = set()
        while self.waiting and len(self.running) < self.config.max_running:
            state = self.waiting.popleft()
            tokens = state.tokens
            if awaited and tokens.tobytes() in awaited:
                deferred.append(state)
                continue
            if not self._make_room(len(tokens) + 1):
                self.waiting.appendleft(state)
                break
            if not self._place(state, tokens, copies):
                awaited.add(tokens.tobytes())
                deferred.append(state)
        self.waiting.extendleft(reversed(deferred))
        if copies:
            length = max(int(self._table.valid[row]) for row in copies)
            self._table.cache.copy_rows(list(copies.values()), list(copies), length)

    def _place(self, state: RequestState, tokens: np.ndarray, copies: dict[int, int]) -> bool:
        """Put a request into a row; False if it should wait for a prefix that is being computed."""
        table = self._table
        match = table.match(tokens) if self.config.prefix_reuse else Match(None, 0, pending=False)
        if match.pending:
            return False
        row = table.vacant(match)
        assert row is not None
        if match.row is not None and match.row != row:
            # the copies of one admission are read before any is written: refer to where the content is now
            copies[row] = copies.get(match.row, match.row)
        table.assign(row, state, tokens, match.length)
        self.running[state.request_id] = state
        if state.cached_tokens is None:
            state.cached_tokens = min(match.length, len(state.prompt))
        return True

    def _make_width(self, width: int) -> None:
        """Let rows hold `width` tokens; where memory forbids it, all start over, fewer at a time."""
        table = self._table
        if width <= table.width:
            return
        width = self._rounded(width)
        if self._fits(table.rows, width):
            table.reserve(table.rows, width)
        else:
            self._least_width = width
            self.retract()

    def _make_room(self, width: int) -> bool:
        """Ensure a vacant row that can hold `width` tokens; False if the request has to wait for one."""
        table, most = self._table, self.config.max_running
        width = max(table.width, self._rounded(max(width, self._least_width)))
        if not self.running and not self._fits(max(table.rows, 1), width):
            table.clear()
        limit = self.config.max_cache_tokens
        if limit is not None:
            most = max(1, min(most, limit // width))
        rows = table.rows or min(_FIRST_ROWS, most)
        if len(self.running) == rows:
            rows = min(2 * rows, most)
        if len(self.running) >= rows or rows > most:
            return False
        table.reserve(rows, width)
        return True

    def _fits(self, rows: int, width: int) -> bool:
        limit = self.config.max_cache_tokens
        return limit is None or rows * width <= limit

    def _rounded(self, width: int) -> int:
        return min(1 << (width - 1).bit_length(), self.context_length)

    def _abort_running(self) -> list[Output]:
        outputs: list[Output] = []
        for state in list(self.running.values()):
            outputs += self._finish(state, FinishReason.ABORT)
        # what a retraction sent back to the line has begun, too
        begun = [state for state in self.waiting if state.cached_tokens is not None]
        for state in begun:
            self.waiting.remove(state)
            outputs += _listed(state.output(self.version, FinishReason.ABORT))
        return outputs

    def _finish(self, state: RequestState, reason: FinishReason) -> list[Output]:
        self._leave(state, retain=self.config.prefix_reuse)
        return _listed(state.output(self.version, reason))

    def _fail(self, state: RequestState, error: GymError) -> list[Output]:
        self._leave(state, retain=False)
        return [Output(state.sink, error)]

    def _leave(self, state: RequestState, *, retain: bool) -> None:
        del self.running[state.request_id]
        assert state.row is not None
        self._table.release(state.row, retain=retain)


def _listed(output: Output | None) -> list[Output]:
    return [] if output is None else [output]
