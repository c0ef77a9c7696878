"""A plan on a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from switchkd.plan.planner import Plan, StagePlan


def show(plan: Plan, console: Console) -> None:
    """Prints what a run would cost, stage by stage, then what would go wrong and what is assumed."""
    config = plan.config
    console.print(
        f"[bold]{escape(config.name)}[/bold] on {plan.gpus} x {plan.gpu.name}, {plan.engine}; an image is "
        f"{plan.visual_tokens:,} visual tokens"
    )
    for table in (_parameters(plan), _time(plan), _arithmetic(plan), _memory(plan)):
        console.print(table)
        console.print()
    disk = ", ".join(f"{name} {_number(size / 1e9)}" for name, size in plan.disk.items())
    console.print(
        f"Disk, GB: {disk}; {_number(sum(plan.disk.values()) / 1e9)} in all, beside the data\n", highlight=False
    )
    _lines(console, "What would go wrong", [p for p in plan.problems if p.stops], "red", "nothing that is checked here")
    _lines(console, "Worth knowing", [p for p in plan.problems if not p.stops], "yellow")
    console.print("[bold]Assumed[/bold]")
    share = (
        f"{plan.efficiency:.2f} of the dense bfloat16 peak of {plan.gpu.tflops:.0f} TFLOP/s; our own step on an H200 "
        "did 0.24; reading pictures, saving and judging are not counted"
    )
    for text in [share, *plan.assumed]:
        console.print(f"  {text}", markup=False, highlight=False)


def _lines(console: Console, title: str, problems: Sequence, colour: str, none: str = "") -> None:
    if not problems and not none:
        return
    console.print(f"[bold]{title}[/bold]")
    for problem in problems:
        console.print(f"  [{colour}]{escape(problem.field)}[/{colour}]: {escape(problem.text)}", highlight=False)
    if not problems:
        console.print(f"  {none}")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _parameters(plan: Plan) -> Table:
    stages = (stage.name for stage in plan.stages)
    table = _table("Parameters, millions; under a stage those that it trains", "", "teacher", "student", *stages)
    rows = {**{part: (part,) for part in plan.student}, "in all": tuple(plan.student)}

    def millions(parameters: dict, parts: tuple, trained: bool = False) -> str:
        count = sum(parameters[part][0] if trained else sum(parameters[part]) for part in parts if parameters)
        return _number(count / 1e6) if count else "-"

    for name, parts in rows.items():
        table.add_row(
            "language model, head" if name == "language model" else name,
            millions(plan.teacher, parts),
            millions(plan.student, parts),
            *(millions(stage.parameters, parts, trained=True) for stage in plan.stages),
        )
    return table


def _time(plan: Plan) -> Table:
    table = _table("Time", "", "samples", "tokens a sample", "batch", "steps", "samples/s", "hours", "GPU-hours")
    for stage in plan.stages:
        found, batch = stage.survey, stage.config.train.batch_size
        hours = stage.hours
        table.add_row(
            stage.name,
            f"{found.samples:,}" if found.samples else "?",
            f"{found.padded:,}",
            f"{batch} x {plan.gpus} x {stage.accumulation}",
            f"{stage.steps:,}" if stage.steps else "?",
            f"{stage.samples_a_second:,.1f}" if stage.samples_a_second else "-",
            _hours(hours),
            _hours(hours and hours * plan.gpus),
        )
    total = plan.gpu_hours
    table.add_row("in all", "", "", "", "", "", _hours(total and total / plan.gpus), _hours(total))
    return table


def _hours(hours: float | None) -> str:
    return "?" if hours is None else f"{hours:,.1f}" if hours >= 0.1 else "< 0.1"


def _arithmetic(plan: Plan) -> Table:
    tera = any(sum(stage.flops.values()) >= 1e11 for stage in plan.stages)
    title = f"Arithmetic of one sample, {'TFLOP' if tera else 'GFLOP'}"
    return _by_stage(title, plan.stages, lambda stage: stage.flops, 1e12 if tera else 1e9, ", ".join)


def _memory(plan: Plan) -> Table:
    title = f"Memory of one GPU in the longest batch, GiB, of {plan.gpu.gibibytes:.0f}"
    return _by_stage(title, plan.stages, lambda stage: stage.memory, 2**30, str)


def _by_stage(
    title: str, stages: Sequence[StagePlan], values: Callable, unit: float, name: Callable[..., str]
) -> Table:
    table = _table(title, "", *(stage.name for stage in stages))
    keys = list(dict.fromkeys(key for stage in stages for key in values(stage)))
    for key in keys:
        cells = [values(stage).get(key, 0) / unit for stage in stages]
        if any(cells):
            table.add_row(name(key), *(_number(cell) for cell in cells))
    table.add_row("in all", *(_number(sum(values(stage).values()) / unit) for stage in stages), style="bold")
    return table


def _number(value: float) -> str:
    if value == 0:
        return "-"
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.01 else "< 0.01"
