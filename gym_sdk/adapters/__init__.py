"""Our rollouts for trainers that are not ours: TRL, verl, slime, prime-rl and tinker.

None of these packages is imported here. `TRLRollouts` is a rollout function for TRL's `GRPOTrainer`; the
others are functions from groups or rows to the plain records that the trainer takes.
"""

from gym_sdk.adapters.prime_rl import PrimeRLRecord, to_prime_rl
from gym_sdk.adapters.slime import SlimeRecord, SlimeSamples, slime_advantages, to_slime
from gym_sdk.adapters.split import SplitRow, split_row
from gym_sdk.adapters.tinker import TinkerInputs, TinkerRecord, to_tinker
from gym_sdk.adapters.trl import TRLRollouts
from gym_sdk.adapters.trl_fields import reward_from_rollout, trl_fields
from gym_sdk.adapters.verl import VerlBatch, VerlTensors, to_verl

__all__ = [
    "PrimeRLRecord",
    "SlimeRecord",
    "SlimeSamples",
    "SplitRow",
    "TRLRollouts",
    "TinkerInputs",
    "TinkerRecord",
    "VerlBatch",
    "VerlTensors",
    "reward_from_rollout",
    "slime_advantages",
    "split_row",
    "to_prime_rl",
    "to_slime",
    "to_tinker",
    "to_verl",
    "trl_fields",
]
