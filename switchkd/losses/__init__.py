"""Losses between the logits of a student and of a teacher, [N, V], [N, V] -> [N], a value per answer position; and
between their vision features, a value per image."""

from switchkd.losses.answers import answer_rows, answer_terms
from switchkd.losses.dbild import bild_loss, dbild_loss, knee
from switchkd.losses.divergences import forward_kl, jsd, reverse_kl
from switchkd.losses.features import image_weights, token_cosine, token_relation

__all__ = [
    "answer_rows",
    "answer_terms",
    "bild_loss",
    "dbild_loss",
    "forward_kl",
    "image_weights",
    "jsd",
    "knee",
    "reverse_kl",
    "token_cosine",
    "token_relation",
]
