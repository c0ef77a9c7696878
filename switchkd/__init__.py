"""switchkd: visual-switch knowledge distillation of vision-language models."""

from switchkd.lazy import lazily

__all__ = ["SupervisedMethod", "SwitchKD", "Terms"]
__version__ = "0.1.0"

__getattr__ = lazily(__name__, dict.fromkeys(__all__, "methods"))
