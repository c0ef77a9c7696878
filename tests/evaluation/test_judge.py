"""Judging by several processes: every question is answered once and by one of them, also where there are fewer."""

from types import SimpleNamespace

import pytest
import torch

from switchkd.data import Conversation
from switchkd.evaluation import judge as judging
from switchkd.evaluation.config import JudgeConfig
from switchkd.evaluation.generate import Answer


def question(index):
    talk = [("user", "Is there any crazing?"), ("assistant", "yes")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in talk]
    return Conversation(str(index), messages, [], "exists")


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9])
def test_shares_are_the_questions_in_order_and_of_one_size(count, processes):
    questions = list(range(count))
    shares = [judging.share(questions, process, processes) for process in range(processes)]
    assert [each for share in shares for each in share] == questions
    assert {len(share) for share in shares} <= {count // processes, count // processes + 1}


@pytest.mark.parametrize(("count", "processes"), [(1, 2), (2, 3), (5, 2), (3, 1)])
def test_each_question_is_answered_by_one_process(monkeypatch, count, processes):
    questions = [question(index) for index in range(count)]
    answered = []

    def generate(model, processor, part, **options):
        answered.extend(each.id for each in part)
        return [Answer("yes", (), ()) for _ in part]

    monkeypatch.setattr(judging, "generate_answers", generate)
    monkeypatch.setattr(judging, "gather_object", lambda given: [Answer("yes", (), ())] * count)
    for process in range(processes):
        state = SimpleNamespace(
            device="cpu",
            process_index=process,
            num_processes=processes,
            is_main_process=False,
            is_local_main_process=False,
            print=print,
        )
        monkeypatch.setattr(judging, "PartialState", lambda state=state: state)
        run = SimpleNamespace(config=SimpleNamespace(judge=JudgeConfig()))
        judging.judge_models(run, [judging.Row("student", torch.nn.Linear(1, 1), None)], questions)
    assert answered == [each.id for each in questions]
