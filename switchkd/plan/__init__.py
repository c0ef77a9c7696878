"""What a run would cost and what would go wrong with it, before a weight is downloaded: `switchkd plan`."""

from switchkd.plan.checks import Problem
from switchkd.plan.planner import Plan, StagePlan, make_plan
from switchkd.plan.printed import show

__all__ = ["Plan", "Problem", "StagePlan", "make_plan", "show"]
