"""The embedded engine: continuous batching over a transformers model, in this process.

- `engine`: `TransformersEngine`, the asyncio face.
- `config`: sizes and limits.
- `worker`: the thread that steps.
- `scheduler`: who runs, and what one step computes.
- `slots`, `cache`: rows of the batch, their tokens, keys and values.
- `attention`: attention over slots under the model's own module.
- `draw`: what one step samples.
- `sampling`: from logits to tokens and log-probs.
- `masks`: which tokens grammars allow next.
- `request`, `delivery`: a request's progress and its way back to the event loop.
- `aside`: one-off torch work without a lasting thread pool.
- `loading`, `weights`, `support`: models from folders, weight updates, what can be served.
"""

from backends.transformers.config import EngineConfig
from backends.transformers.engine import TransformersEngine

__all__ = ["EngineConfig", "TransformersEngine"]
