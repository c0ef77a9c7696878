"""Bad samples of a set: counted, reported and skipped up to a stated rate, never silently."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TypeVar

logger = logging.getLogger(__name__)

REASONS_SHOWN = 3

Item = TypeVar("Item")
Made = TypeVar("Made")


def keep_good(items: Iterable[Item], make: Callable[[Item], Made], *, max_bad_rate: float, what: str) -> list[Made]:
    """`make(item)` of every item for which it does not raise ValueError or FileNotFoundError.

    `max_bad_rate` is the largest share (0 to 1) of items that may be bad; with 0 the first bad one is an
    error. `what` names the set in messages, such as "train.json". Skipped items are reported in one warning
    with their count and the first reasons.

    Raises ValueError with count, rate and first reasons when more items are bad, and when none is left.
    """
    if not 0 <= max_bad_rate <= 1:
        raise ValueError(f"max_bad_rate={max_bad_rate} must lie between 0 and 1")
    made, reasons, bad, total = [], [], 0, 0
    for item in items:
        total += 1
        try:
            made.append(make(item))
        except (ValueError, FileNotFoundError) as error:
            if max_bad_rate == 0:
                raise
            bad += 1
            if len(reasons) < REASONS_SHOWN:
                reasons.append(str(error))
    if bad:
        first = " | ".join(reasons)
        if bad > max_bad_rate * total or not made:
            raise ValueError(
                f"{what}: {bad} of {total} samples are bad ({bad / total:.1%}), more than"
                f" max_bad_rate={max_bad_rate} allows. Correct them or raise max_bad_rate."
                f" First reasons: {first}"
            )
        logger.warning("%s: skipped %d bad samples of %d. First reasons: %s", what, bad, total, first)
    return made
