"""Grammars that hold generations to tools, schemas and answers, in each model's own format."""

from backends.constraints.constraints import Constraints
from backends.constraints.demand import ANY_OBJECT, Demand

__all__ = ["ANY_OBJECT", "Constraints", "Demand"]
