"""switchkd: visual-switch knowledge distillation of vision-language models."""

from switchkd.methods import SupervisedMethod, SwitchKD, Terms

__all__ = ["SupervisedMethod", "SwitchKD", "Terms"]
__version__ = "0.1.0"
