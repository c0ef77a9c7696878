"""The table at the end of a run: a row a model, a column a kind of question."""

from __future__ import annotations

from collections.abc import Mapping


def results_table(results: Mapping[str, Mapping]) -> str:
    """Markdown table of `results`: row name -> scores of `score_answers`, optionally with "parameters".

    Shares are shown in percent. `average` is the mean accuracy over the kinds answered by exact match; located
    answers have columns of their own. The last row is the majority answer of each kind, the score of one fixed answer.
    """
    first = next(iter(results.values()))
    kinds = list(first["accuracy"])
    located = "locate" in first
    columns = [kind or "accuracy" for kind in kinds]  # conversations from a file name no kind
    head = ["model", "parameters", *columns, "average"] + located * ["locate F1", "AP50", "AP", "malformed"]
    rows = [head]
    for name, scores in results.items():
        row = [name, _millions(scores.get("parameters"))]
        row += [_percent(scores["accuracy"][kind]) for kind in kinds] + [_percent(scores["average"])]
        if located:
            row += [_percent(scores["locate"][column]) for column in ("f1", "ap50", "ap", "malformed")]
        rows.append(row)
    majority = first["majority"]
    average = sum(majority.values()) / len(majority) if majority else None
    fixed = ["one fixed answer", "", *[_percent(majority[kind]) for kind in kinds], _percent(average)]
    rows.append(fixed + located * [""] * 4)
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [_line(row, widths) for row in rows]
    rule = "|" + "|".join("-" * (width + 1) + (":" if column else "-") for column, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _line(row: list[str], widths: list[int]) -> str:
    cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "| " + " | ".join(cells) + " |"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _millions(parameters: int | None) -> str:
    return "" if parameters is None else f"{parameters / 1e6:.2f}M"
