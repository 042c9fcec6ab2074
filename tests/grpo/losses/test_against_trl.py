"""The losses and advantages against TRL's published `GRPOTrainer` (1.16) on equal inputs.

TRL's own methods run unchanged: `_generate_and_score_completions` for advantages and importance weights,
`_compute_loss` for the loss. Only what they call to sample, to score and to run the model is replaced, so
that both sides see the same log-probs. Values and gradients agree to 1e-10 relative.

Where the definitions differ: TRL has no clamps (of log-ratios, and of k3 at 10), so the log-probs here stay
within them; its cispo takes the cap itself, ours the range above 1; its dr_grpo, grpo and gspo count rows
without tokens, so each row here has one; its deviations are the sample's, plus 1e-4; its sequence_mask keeps
the product as weight, which is our sequence_mis. It has no counterpart of sequence_mask and geometric_mask
(rejection without weight), of k1 and k2, and of a lower bound for cispo.
"""

from __future__ import annotations

import importlib
import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from grpo.losses.batches import Minibatch, draw_minibatch
from torch import Tensor

from gym_sdk.grpo.losses import LossConfig, loss_normaliser, policy_loss
from gym_sdk.tokens import group_advantages

FOLDER = Path(sys.prefix) / "trl"
GROUP = 3


@pytest.fixture(scope="module")
def trl_trainer() -> Iterator[type[Any]]:
    """TRL's trainer class, importable for this module only."""
    if not FOLDER.is_dir():
        pytest.fail(
            f"install TRL beside the environment: pip install --no-deps --target {FOLDER} trl==1.16.0"
        )
    sys.path.insert(0, str(FOLDER))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module("trl.trainer.grpo_trainer")
    finally:
        sys.path.remove(str(FOLDER))
    yield module.GRPOTrainer
    # accelerate's choice of a device is global
    importlib.import_module("accelerate.state").AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def batch() -> Minibatch:
    """Two groups of three rows, each a run of tokens with loss from column 0: TRL's layout of completions."""
    mask = torch.arange(9) < torch.tensor([9, 4, 1, 7, 5, 3])[:, None]
    batch = draw_minibatch(11, rows=2 * GROUP, mask=mask, outside=-0.7)
    batch.reference = (batch.log_probs + (batch.reference - batch.log_probs).clamp(-1, 1)).detach()
    batch.advantages = torch.linspace(-1.2, 1.4, 2 * GROUP, dtype=torch.float64)[:, None].expand(-1, 9)
    return batch


def make_trainer(cls: type[Any], batch: Minibatch, **changes: Any) -> Any:
    """A trainer that did not go through TRL's `__init__`: the attributes that the two methods read."""
    from accelerate import Accelerator  # comes with TRL

    class Trainer(cls):  # type: ignore[misc]
        def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
            ids = [[1] * int(count) for count in batch.mask.sum(-1)]
            log_probs = [row[mask].tolist() for row, mask in zip(batch.behaviour, batch.mask, strict=True)]
            return [[1, 1]] * len(ids), ids, None, ids, log_probs, {}, None, None

        def _calculate_rewards(self, *_: Any) -> Tensor:
            return self.rewards

        def _get_per_token_logps_and_entropies(self, model: Any, *_: Any, **options: Any) -> tuple[Any, ...]:
            if options.get("compute_entropy"):
                return batch.log_probs, batch.entropy, None
            return batch.reference if model is self.ref_model else batch.proximal, None, None

    trainer = object.__new__(Trainer)
    options: dict[str, Any] = {
        "delta": None,
        "use_bias_correction_kl": False,
        "steps_per_generation": 1,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing_kwargs": None,
        "per_device_train_batch_size": 99,
    }
    attributes: dict[str, Any] = {
        "accelerator": Accelerator(cpu=True),
        "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
        "ref_model": object(),
        "loss_type": "dapo",
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "beta": 0.0,
        "max_completion_length": 9,
        "entropy_coef": 0.0,
        "use_vllm": True,
        "vllm_importance_sampling_correction": False,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_min": None,
        "vllm_importance_sampling_clip_max": 3.0,
        "scale_rewards": "group",
        "multi_objective_aggregation": "sum_then_normalize",
        "num_generations": GROUP,
        "num_iterations": 1,
        "rewards": torch.zeros((2 * GROUP, 1)),
        "reward_weights": torch.ones(1),
        "reward_funcs": [None],
        "reward_func_names": ["reward"],
        "current_gradient_accumulation_steps": 1,
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_adaptive_entropy": False,
        "mask_truncated_completions": False,
        "environment_factories": None,
        "environments": None,
        "tools": None,
        "pad_to_multiple_of": None,
        "_tokenizer": SimpleNamespace(pad_token_id=0),
        "_metrics": {"train": defaultdict(list)},
        "_logs": defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        "_pending_extra_logs": {},
        "_pending_metrics": {},
        "_entropy_bonus_enabled": bool(changes.get("entropy_coef")),
    }
    for name, value in changes.items():
        (options if name in options else attributes)[name] = value
    for name, value in attributes.items():
        setattr(trainer, name, value)
    trainer.args = SimpleNamespace(**options)
    return trainer


def trl_loss(trainer: Any, batch: Minibatch, *, old: Tensor, weights: Tensor | None = None) -> Tensor:
    """The loss of TRL's `_compute_loss`."""
    ones = torch.ones((2 * GROUP, 2), dtype=torch.long)
    inputs = {
        "prompt_ids": ones,
        "prompt_mask": ones,
        "completion_ids": torch.ones_like(batch.mask, dtype=torch.long),
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages[:, 0],
        "num_items_in_batch": batch.mask.sum(),
        "old_per_token_logps": old,
        "ref_per_token_logps": batch.reference,
    }
    if weights is not None:
        inputs["importance_sampling_ratio"] = weights
    return trainer._compute_loss(trainer.model, inputs)


def our_loss(batch: Minibatch, config: LossConfig) -> Tensor:
    return policy_loss(
        batch.log_probs,
        batch.behaviour,
        batch.advantages,
        batch.mask,
        normaliser=loss_normaliser(batch.mask.sum(-1).tolist(), config),
        config=config,
        proximal_log_probs=batch.proximal,
        reference_log_probs=batch.reference,
        entropy=batch.entropy,
    ).loss


def assert_equal(batch: Minibatch, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    inputs = (batch.log_probs, batch.entropy)
    expected = torch.autograd.grad(theirs, inputs, allow_unused=True, materialize_grads=True)
    actual = torch.autograd.grad(ours, inputs, allow_unused=True, materialize_grads=True)
    for mine, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    assert actual[0].abs().sum() > 0


GSPO = {
    "importance_sampling_level": "sequence",
    "loss_type": "grpo",
    "epsilon_low": 0.1,
    "epsilon_high": 0.15,
}

LOSSES: list[tuple[LossConfig, dict[str, Any]]] = [
    (LossConfig.dapo(), {"loss_type": "dapo"}),
    (LossConfig.dapo(), {"loss_type": "bnpo"}),  # one micro-batch: its local mean is the global one
    (LossConfig.grpo(kl_coefficient=0.0), {"loss_type": "grpo", "epsilon_high": 0.2}),
    (LossConfig.grpo(kl_coefficient=0.04), {"loss_type": "grpo", "epsilon_high": 0.2, "beta": 0.04}),
    (LossConfig.dr_grpo(9), {"loss_type": "dr_grpo", "epsilon_high": 0.2}),
    (LossConfig.dapo(dual_clip=1.4), {"delta": 1.4}),
    (LossConfig.cispo(clip_high=0.4), {"loss_type": "cispo", "epsilon_high": 1.4}),  # TRL's is the cap itself
    (LossConfig.gspo(clip_low=0.1, clip_high=0.15), GSPO),
    (LossConfig.gspo(clip_low=0.1, clip_high=0.15, aggregation="token"), GSPO | {"loss_type": "dapo"}),
    (LossConfig.gspo(clip_low=0.1, clip_high=0.15, dual_clip=1.2), GSPO | {"delta": 1.2}),
    (LossConfig.dapo(entropy_coefficient=0.05), {"entropy_coef": 0.05}),
]


@pytest.mark.parametrize(("config", "changes"), LOSSES)
def test_losses_equal_trl(
    trl_trainer: type[Any], batch: Minibatch, config: LossConfig, changes: dict[str, Any]
) -> None:
    trainer = make_trainer(trl_trainer, batch, **changes)
    assert_equal(batch, our_loss(batch, config), trl_loss(trainer, batch, old=batch.behaviour))


CORRECTIONS: list[tuple[dict[str, Any], str, tuple[float | None, float | None]]] = [
    ({"correction": "token_tis", "correction_high": 1.2}, "token_truncate", (None, 1.2)),
    (
        {"correction": "token_tis", "correction_low": 0.9, "correction_high": 1.2},
        "token_truncate",
        (0.9, 1.2),
    ),
    ({"correction": "token_tis", "correction_high": math.inf}, "token_mask", (None, None)),
    ({"correction": "icepop", "correction_low": 0.8, "correction_high": 1.2}, "token_mask", (0.8, 1.2)),
    ({"correction": "sequence_tis", "correction_high": 1.2}, "sequence_truncate", (None, 1.2)),
    (
        {"correction": "sequence_mis", "correction_low": 0.6, "correction_high": 1.3},
        "sequence_mask",
        (0.6, 1.3),
    ),
]


@pytest.mark.parametrize(("options", "mode", "bounds"), CORRECTIONS)
def test_corrections_equal_trl(
    trl_trainer: type[Any],
    batch: Minibatch,
    options: dict[str, Any],
    mode: str,
    bounds: tuple[float | None, float | None],
) -> None:
    batch.behaviour = batch.behaviour.float().double()  # TRL makes float32 tensors of the sampler's lists
    trainer = make_trainer(
        trl_trainer,
        batch,
        beta=0.04,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=bounds[0],
        vllm_importance_sampling_clip_max=bounds[1],
    )
    scored = trainer._generate_and_score_completions([{"prompt": "p"}] * (2 * GROUP))
    weights = scored["importance_sampling_ratio"]
    assert weights.unique().numel() > 1
    config = LossConfig(anchor="proximal", kl_coefficient=0.04, **options)
    theirs = trl_loss(trainer, batch, old=scored["old_per_token_logps"], weights=weights)
    assert_equal(batch, our_loss(batch, config), theirs)


@pytest.mark.parametrize(("scale", "theirs"), [("std", "group"), ("none", "none"), ("batch", "batch")])
def test_advantages_equal_trl(trl_trainer: type[Any], batch: Minibatch, scale: Any, theirs: str) -> None:
    """TRL divides by the sample deviation plus 1e-4, we by the population's: a known factor."""
    rewards = [0.0, 1.0, None, 3.5, -2.0, 0.25]
    trainer = make_trainer(trl_trainer, batch, scale_rewards=theirs)
    trainer.rewards = torch.tensor(
        [[math.nan if reward is None else reward] for reward in rewards], dtype=torch.float64
    )
    trainer.reward_weights = torch.ones(1, dtype=torch.float64)
    expected = trainer._generate_and_score_completions([{"prompt": "p"}] * 6)["advantages"].tolist()
    sizes = {"std": [2, 2, 2, 3, 3, 3], "none": [math.inf] * 6, "batch": [5] * 6}[scale]
    groups = ["a"] * 3 + ["b"] * 3
    for index, size in enumerate(sizes):
        factor = 1.0 if scale == "none" else math.sqrt((size - 1) / size)
        ours = group_advantages(rewards, groups, scale=scale, epsilon=1e-4 * factor)[index]
        # what TRL gives a rollout without reward is 0: it stays in the batch
        assert (0.0 if ours is None else ours * factor) == pytest.approx(expected[index], rel=1e-12)
