"""A plan on a terminal, whole at any width from 60 columns on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from switchkd.plan.planner import Plan, StagePlan

GAP = 2  # columns of space between those of a table


def show(plan: Plan, console: Console) -> None:
    """Prints what a run would cost, stage by stage, then what would go wrong and what is assumed."""
    config = plan.config
    console.print(
        f"[bold]{escape(config.name)}[/bold] on {plan.gpus} x {plan.gpu.name}, {plan.engine}; an image is "
        f"{plan.visual_tokens:,} visual tokens"
    )
    for table in (_parameters, _time, _arithmetic, _memory):
        _print_table(console, *table(plan))
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


def _print_table(console: Console, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column are labels and whose last row are sums where it begins with "in all".

    No cell is ever cut: columns that do not fit beside the labels follow below, with the labels again.
    """
    console.print(f"[bold]{escape(title)}[/bold]", highlight=False)
    widths = [
        max(cell_len(line) for cell in column for line in cell.split("\n")) for column in zip(head, *rows, strict=True)
    ]
    columns = list(range(1, len(head)))
    while columns:
        fitting, width = [], widths[0]
        while columns and (not fitting or width + GAP + widths[columns[0]] <= console.width):
            width += GAP + widths[columns[0]]
            fitting.append(columns.pop(0))
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="")
        for column in (0, *fitting):
            table.add_column(Text(head[column]), justify="right" if column else "left", no_wrap=True, vertical="bottom")
        for row in rows:
            style = "bold" if row[0] == "in all" else ""
            table.add_row(*(Text(row[column]) for column in (0, *fitting)), style=style)
        console.print(table)
        console.print()


def _parameters(plan: Plan) -> tuple:
    parts = list(plan.student)
    models = {"teacher": plan.teacher, "student": plan.student}
    counts = {name: [sum(model[part]) for part in parts] for name, model in models.items() if model}
    counts |= {f"trained in {each.name}": [each.parameters[part][0] for part in parts] for each in plan.stages}
    head = ["", *("language model, head" if part == "language model" else part for part in parts), "in all"]
    rows = [[name, *(_number(count / 1e6) for count in (*row, sum(row)))] for name, row in counts.items()]
    return "Parameters, millions", head, rows


def _time(plan: Plan) -> tuple:
    rows = []
    for stage in plan.stages:
        found, hours = stage.survey, stage.hours
        rows.append(
            [
                stage.name,
                f"{found.samples:,}" if found.samples else "?",
                f"{found.padded:,}",
                f"{stage.config.train.batch_size} x {plan.gpus} x {stage.accumulation}",
                f"{stage.steps:,}" if stage.steps else "?",
                f"{stage.samples_a_second:,.1f}" if stage.samples_a_second else "-",
                _hours(hours),
                _hours(hours and hours * plan.gpus),
            ]
        )
    total = plan.gpu_hours
    rows.append(["in all", "", "", "", "", "", _hours(total and total / plan.gpus), _hours(total)])
    return (
        "Time",
        ["", "samples", "tokens\neach", "batch x GPUs\nx accumulation", "steps", "samples\n/s", "hours", "GPU-\nhours"],
        rows,
    )


def _hours(hours: float | None) -> str:
    return "?" if hours is None else f"{hours:,.1f}" if hours >= 0.1 else "< 0.1"


def _arithmetic(plan: Plan) -> tuple:
    tera = any(sum(stage.flops.values()) >= 1e11 for stage in plan.stages)
    title = f"Arithmetic of one sample, {'TFLOP' if tera else 'GFLOP'}"
    return title, *_by_stage(plan.stages, lambda stage: stage.flops, 1e12 if tera else 1e9, ", ".join)


def _memory(plan: Plan) -> tuple:
    title = f"Memory of one GPU in the longest batch, GiB, of {plan.gpu.gibibytes:.0f}"
    return title, *_by_stage(plan.stages, lambda stage: stage.memory, 2**30, str)


def _by_stage(stages: Sequence[StagePlan], values: Callable, unit: float, name: Callable[..., str]) -> tuple:
    rows = []
    for key in dict.fromkeys(key for stage in stages for key in values(stage)):
        cells = [values(stage).get(key, 0) / unit for stage in stages]
        if any(cells):
            rows.append([name(key), *(_number(cell) for cell in cells)])
    rows.append(["in all", *(_number(sum(values(stage).values()) / unit) for stage in stages)])
    return ["", *(stage.name for stage in stages)], rows


def _number(value: float) -> str:
    if value == 0:
        return "-"
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.01 else "< 0.01"
