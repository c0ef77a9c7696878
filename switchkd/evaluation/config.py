"""How models are judged: the `judge` section of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from switchkd.config import at_least


@dataclass(frozen=True)
class JudgeConfig:
    """How models answer the test questions."""

    batch_size: int = 64
    """Questions answered at once."""
    max_new_tokens: int = 256
    """Longest answer, in tokens; a located answer that is cut counts as malformed."""

    def __post_init__(self):
        at_least("judge", self, batch_size=1, max_new_tokens=1)
