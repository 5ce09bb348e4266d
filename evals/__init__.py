"""Sets of problems in, figures out. What training needs of it; eval.py opens its files one by one."""

from evals.held_out import HeldOut
from evals.sets import load_sets

__all__ = ["HeldOut", "load_sets"]
