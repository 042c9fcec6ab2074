"""Rollouts on disk: the journal that a run writes and goes on from, and what is done with it afterwards."""

from gym_sdk.store.export import ExportReport, to_dataset, to_parquet
from gym_sdk.store.heads import task_fingerprint
from gym_sdk.store.journal import Journal
from gym_sdk.store.merging import MergeReport, merge
from gym_sdk.store.repair import Damage, StoreReport, check, repair
from gym_sdk.store.reverify import ReverifyReport, reverify
from gym_sdk.store.scanning import read_rollouts
from gym_sdk.store.summary import StoreSummary, summarize

__all__ = [
    "Damage",
    "ExportReport",
    "Journal",
    "MergeReport",
    "ReverifyReport",
    "StoreReport",
    "StoreSummary",
    "check",
    "merge",
    "read_rollouts",
    "repair",
    "reverify",
    "summarize",
    "task_fingerprint",
    "to_dataset",
    "to_parquet",
]
