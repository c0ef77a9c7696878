"""Judging a run: every model answers the same test questions, and one table says how well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from transformers import ProcessorMixin

from switchkd.data import Conversation
from switchkd.evaluation.drawing import draw_located
from switchkd.evaluation.generate import generate_answers
from switchkd.evaluation.scores import judged_rows, score_answers
from switchkd.evaluation.table import results_table
from switchkd.runs import RESULTS, RunFolder


@dataclass(frozen=True)
class Row:
    """One row of the table. processor: the model's own. blank: every picture is replaced by an even grey one."""

    name: str
    model: nn.Module
    processor: ProcessorMixin
    blank: bool = False


def share(questions: Sequence[Conversation], process: int, processes: int) -> Sequence[Conversation]:
    """What one of `processes` answers: all shares, in order of the processes, are `questions`; one can be empty.

    accelerate's own split repeats the last question where there are fewer than processes (1.13).
    """
    return questions[len(questions) * process // processes : len(questions) * (process + 1) // processes]


def judge_models(run: RunFolder, rows: Sequence[Row], questions: list[Conversation]) -> None:
    """All `rows` answer `questions`, shared out over the processes; writes results.json, answers.jsonl, table.md and
    boxes.png (where a question asks for boxes) into the run's folder, and prints the table."""
    state = PartialState()
    results, answers, lines = {}, {}, []
    for row in rows:
        model = row.model.to(state.device)
        state.print(f"judging: {row.name}")
        given = generate_answers(
            model,
            row.processor,
            share(questions, state.process_index, state.num_processes),
            blank_image=row.blank,
            progress=state.is_local_main_process,
            **asdict(run.config.judge),
        )
        answers[row.name] = gather_object(given)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        results[row.name] = {"parameters": parameters, **score_answers(questions, answers[row.name])}
        lines += [{"model": row.name, **line} for line in judged_rows(questions, answers[row.name])]
    if not state.is_main_process:
        return
    table = results_table(results)
    run.write("answers.jsonl", lines)
    run.write_text("table.md", table)
    sheet = draw_located(questions, {row.name: answers[row.name] for row in rows if not row.blank})
    if sheet is not None:
        sheet.save(run.path / "boxes.png")
    run.write(RESULTS, results)
    print(f"\n{table}")
