"""switchkd: visual-switch knowledge distillation of vision-language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from switchkd.methods import SupervisedMethod, SwitchKD, Terms

__all__ = ["SupervisedMethod", "SwitchKD", "Terms"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # torch is imported when a method is asked for, so that `switchkd --help` is quick
    if name not in __all__:
        raise AttributeError(f"module 'switchkd' has no attribute {name!r}")
    from switchkd import methods

    return getattr(methods, name)
