"""Losses between the logits of a student and of a teacher, [N, V], [N, V] -> [N], a value per answer position; and
between their vision features, a value per image."""

from switchkd.lazy import lazily

__all__ = [
    "answer_rows",
    "answer_terms",
    "bild_loss",
    "check_divergence",
    "dbild_loss",
    "divergence",
    "forward_kl",
    "image_weights",
    "jsd",
    "knee",
    "reverse_kl",
    "token_cosine",
    "token_relation",
]

__getattr__ = lazily(
    __name__,
    {
        "answer_rows": "answers",
        "answer_terms": "answers",
        "bild_loss": "dbild",
        "check_divergence": "named",
        "dbild_loss": "dbild",
        "divergence": "named",
        "forward_kl": "divergences",
        "image_weights": "features",
        "jsd": "divergences",
        "knee": "dbild",
        "reverse_kl": "divergences",
        "token_cosine": "features",
        "token_relation": "features",
    },
)
