"""Supervised training before reinforcement learning: first an exercise, then traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from random import Random

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from backends.tiny.examples import Batch, Example, ExampleEncoder, make_batches
from backends.tiny.muon import Muon
from backends.tiny.recipe import TinyRecipe

__all__ = ["warm_start"]

_WARM_UP_STEPS = 20
_MAX_GRADIENT_NORM = 1.0
_TYPICAL_LOSS_TOKENS = 20  # in a row; keeps the loss near a mean


def warm_start(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: TinyRecipe,
    progress: Callable[[str, float], None],
) -> None:
    """Train the model in place.

    The exercise comes first: a model that has not learned to copy miscopies the arguments of its tool calls,
    and then no reward teaches it anything.

    Args:
        model: in float32.
        tokenizer: the one that rollouts use.
        recipe: how long, on what, how fast.
        progress: called after each step with the stage and the fraction done of all steps.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    steps = recipe.copy_steps + recipe.trace_steps
    model.train()
    with torch.enable_grad():
        for step, (stage, batch) in enumerate(_batches(tokenizer, recipe)):
            _masked_loss(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT_NORM)
            factor = _learning_rate_factor(step, recipe)
            muon.step(factor * recipe.matrix_learning_rate)
            for group in adam.param_groups:
                group["lr"] = factor * recipe.learning_rate
            adam.step()
            adam.zero_grad()
            progress(stage, (step + 1) / steps)
    model.eval()


def _batches(tokenizer: PreTrainedTokenizerFast, recipe: TinyRecipe) -> Iterator[tuple[str, Batch]]:
    rng = Random(recipe.seed)
    encoder = ExampleEncoder(tokenizer, recipe.mix.tool)
    traces = recipe.mix.traces(rng)
    stages: list[tuple[str, Callable[[], Example], int]] = [
        ("drill", lambda: encoder.drill(recipe.mix.drill(rng)), recipe.copy_steps),
        ("traces", lambda: encoder.trace(next(traces)), recipe.trace_steps),
    ]
    for stage, draw, steps in stages:
        for batch in make_batches(rng, draw, recipe.batch_size, steps, tokenizer.pad_token_id):
            yield stage, batch


def _learning_rate_factor(step: int, recipe: TinyRecipe) -> float:
    """Rise over the first steps, stay, and fall along a cosine while on traces."""
    if step < recipe.copy_steps:
        return min(1.0, (step + 1) / _WARM_UP_STEPS)
    return 0.5 * (1.0 + math.cos(math.pi * (step - recipe.copy_steps) / recipe.trace_steps))


def _masked_loss(model: Qwen3ForCausalLM, batch: Batch) -> torch.Tensor:
    """Cross entropy of the tokens that carry loss, divided by a constant; logits are for these alone.

    A mean over the batch would let tokens weigh more in batches of short rows: rows are batched by length,
    and the short ones are guesses.
    """
    hidden = model.model(input_ids=batch.token_ids, use_cache=False).last_hidden_state[:, :-1]
    mask = batch.loss_mask[:, 1:]
    logits = model.lm_head(hidden[mask])
    total = cross_entropy(logits, batch.token_ids[:, 1:][mask], reduction="sum")
    return total / (_TYPICAL_LOSS_TOKENS * batch.token_ids.shape[0])
