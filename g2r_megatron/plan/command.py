"""`g2r plan`: make a plan, print it, and say by the exit code whether the job can work."""

import sys
from dataclasses import replace

from g2r_megatron.config.options import Layout
from g2r_megatron.plan.checks import Problems, check_config
from g2r_megatron.plan.config import PlanConfig
from g2r_megatron.plan.planner import make_plan
from g2r_megatron.plan.suggest import Suggestion, suggest
from g2r_megatron.plan.tables import console, plan_json, print_plan, print_suggestions, suggestions_json


def run_plan(config: PlanConfig) -> int:
    """Print the plan of a config (its preset resolved): 0 if the job fits, 2 and a line a problem if not."""
    if config.suggest:
        problems, suggestions = Problems(), []
        suggestions = _suggestions(config, problems)
        if config.json:
            print(suggestions_json(suggestions, problems))
        elif suggestions:
            print_suggestions(suggestions, console())
    else:
        plan = make_plan(config)
        problems = plan.problems
        if config.json:
            print(plan_json(plan))
        else:
            print_plan(plan, console())
    sys.stdout.flush()
    for problem in problems:
        print(f"g2r: error: {problem}", file=sys.stderr)
    return 2 if problems else 0


def _suggestions(config: PlanConfig, problems: Problems) -> list[Suggestion]:
    """The config's own layouts do not matter: workable ones are searched for."""
    judge = replace(config.judge, layout=Layout(), ranks=0, parts=1, offload=False)
    config = replace(config, policy=replace(config.policy, layout=Layout()), judge=judge)
    policy_model, judge_model = check_config(config, problems)
    return [] if problems else suggest(config, policy_model, judge_model, problems)
