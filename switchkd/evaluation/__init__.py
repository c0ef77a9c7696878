"""Judging a model: its answers with their probabilities, and what they are worth."""

from switchkd.evaluation.answers import answer_rows, score_answers
from switchkd.evaluation.detection_qa import all_found, box_scores, parse_boxes, score_detections
from switchkd.evaluation.generate import Answer, generate_answers

__all__ = [
    "Answer",
    "all_found",
    "answer_rows",
    "box_scores",
    "generate_answers",
    "parse_boxes",
    "score_answers",
    "score_detections",
]
