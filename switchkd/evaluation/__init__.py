"""Judging a model: its answers with their probabilities, and what they are worth."""

from switchkd.lazy import lazily

__all__ = [
    "Answer",
    "all_found",
    "box_scores",
    "generate_answers",
    "judged_rows",
    "parse_boxes",
    "score_answers",
    "score_boxes",
    "score_detections",
]

__getattr__ = lazily(
    __name__,
    {
        "Answer": "generate",
        "all_found": "detection_qa",
        "box_scores": "detection_qa",
        "generate_answers": "generate",
        "judged_rows": "scores",
        "parse_boxes": "detection_qa",
        "score_answers": "scores",
        "score_boxes": "detection",
        "score_detections": "detection_qa",
    },
)
