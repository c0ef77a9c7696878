"""Judging a model: its answers with their probabilities, and what they are worth."""

from switchkd.lazy import lazily

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

__getattr__ = lazily(
    __name__,
    {
        "Answer": "generate",
        "all_found": "detection_qa",
        "answer_rows": "answers",
        "box_scores": "detection_qa",
        "generate_answers": "generate",
        "parse_boxes": "detection_qa",
        "score_answers": "answers",
        "score_detections": "detection_qa",
    },
)
