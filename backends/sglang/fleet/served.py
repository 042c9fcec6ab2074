"""Which weights all replicas of a fleet serve, and how another one gets them."""

from __future__ import annotations

from pathlib import Path

from backends.engine import AdapterWeights, FolderWeights, WeightSource
from backends.sglang.engine import SGLangEngine
from backends.sglang.facts import Facts
from gym_sdk.errors import ConfigurationError

__all__ = ["Served"]


class Served:
    """The weights that count.

    Attributes:
        facts: what the first replica was when it was taken in.
        version: the label of the weights.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.version = facts.weight_version
        folder = Path(facts.model_path)
        self._base_version = facts.weight_version
        # tensors that somebody has sent before leave the path as it was, and it says nothing about them
        known = facts.unchanged and folder.is_dir()
        self._base: WeightSource | None = FolderWeights(folder) if known else None
        self._base_path: str | None = facts.model_path if known else None
        self._adapter: AdapterWeights | None = None

    def took(self, source: WeightSource, version: str) -> None:
        """Note what the replicas have taken."""
        self.version = version
        if isinstance(source, AdapterWeights):
            self._adapter = source
            return
        self._adapter, self._base_version = None, version
        whole = isinstance(source, FolderWeights)
        self._base = source if whole else None
        self._base_path = str(source.path.absolute()) if isinstance(source, FolderWeights) else None

    def check_model(self, url: str, engine: SGLangEngine) -> None:
        """See that a replica serves the same model.

        Raises:
            ConfigurationError: it does not.
        """
        mine, other = self.facts, engine.facts
        different = [
            f"{name} is {theirs}, not {ours}"
            for name, ours, theirs in (
                ("the vocabulary's size", mine.vocab_size, other.vocab_size),
                ("the context length", mine.context_length, other.context_length),
            )
            if ours != theirs
        ]
        if None not in (mine.signature, other.signature) and mine.signature != other.signature:
            different.append("its tensors have other names or shapes")
        if different:
            raise ConfigurationError(f"SGLang at {url} serves another model: {'; '.join(different)}")

    def has(self, engine: SGLangEngine) -> bool:
        """Return whether a replica that was just connected to has the base weights that count."""
        label, path = engine.facts.weight_version, engine.facts.model_path
        return label == self._base_version and self._base_path in (None, path)

    async def bring(self, url: str, engine: SGLangEngine) -> None:
        """Load the weights that count into a replica that was just connected to.

        Raises:
            ConfigurationError: they can't be sent again.
            GymError: they could not be loaded.
        """
        if not self.has(engine):
            if self._base is None:
                raise ConfigurationError(
                    f"SGLang at {url} has the weights {engine.facts.weight_version!r}; those that serve, "
                    f"{self._base_version!r}, came as tensors and can't be sent again. The next update takes "
                    "it in; updates from a folder spare the wait"
                )
            await engine.update_weights(self._base, version=self._base_version)
        if self._adapter is not None:
            await engine.update_weights(self._adapter, version=self.version)
