"""Bad samples of a set: counted, reported and skipped up to a stated rate, never silently."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

logger = logging.getLogger(__name__)

REASONS_SHOWN = 3

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass
class Faults:
    """What is wrong with the samples of one set, `what` in messages: missing files apart from other faults."""

    what: str
    total: int = 0
    missing: int = 0
    other: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, reason: str, *, missing: bool) -> None:
        """Count one bad sample; the first reasons are kept."""
        self.missing += missing
        self.other += not missing
        if len(self.reasons) < REASONS_SHOWN:
            self.reasons.append(reason)

    def report(self, max_bad_rate: float) -> None:
        """One warning with counts and first reasons, nothing where all samples are good.

        Raises ValueError with the same when more than the share `max_bad_rate` is bad, and when none is left.
        """
        bad = self.missing + self.other
        if not bad:
            return
        kinds = f"{self.missing:,} missing files, {self.other:,} other faults"
        first = " | ".join(self.reasons)
        if bad > max_bad_rate * self.total or bad == self.total:
            raise ValueError(
                f"{self.what}: {bad:,} of {self.total:,} samples are bad ({bad / self.total:.1%}), more than"
                f" max_bad_rate={max_bad_rate} allows: {kinds}. Correct them or raise max_bad_rate."
                f" First reasons: {first}"
            )
        skipped = f"skipped {bad:,} bad samples of {self.total:,}: {kinds}"
        logger.warning("%s: %s. First reasons: %s", self.what, skipped, first)


def check_rate(max_bad_rate: float) -> None:
    """Raises ValueError for a rate outside 0 to 1."""
    if not 0 <= max_bad_rate <= 1:
        raise ValueError(f"max_bad_rate={max_bad_rate} must lie between 0 and 1")


def keep_good(items: Iterable[Item], make: Callable[[Item], Made], *, max_bad_rate: float, what: str) -> list[Made]:
    """`make(item)` of every item for which it does not raise ValueError or FileNotFoundError.

    `max_bad_rate` is the largest share (0 to 1) of items that may be bad; with 0 the first bad one is an
    error. `what` names the set in messages, such as "train.json". Skipped items are reported in one warning
    with their counts, missing files apart from other faults, and the first reasons.

    Raises ValueError with counts, rate and first reasons when more items are bad, and when none is left.
    """
    check_rate(max_bad_rate)
    made, faults = [], Faults(what)
    for item in items:
        faults.total += 1
        try:
            made.append(make(item))
        except (ValueError, FileNotFoundError) as error:
            if max_bad_rate == 0:
                raise
            faults.add(str(error), missing=isinstance(error, FileNotFoundError))
    faults.report(max_bad_rate)
    return made
