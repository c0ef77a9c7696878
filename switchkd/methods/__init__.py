"""A method is one nn.Module that holds its student and its frozen teacher; forward(batch) -> Terms."""

from switchkd.methods.supervised import SupervisedMethod
from switchkd.methods.switch_kd import SwitchKD
from switchkd.methods.terms import Terms

__all__ = ["SupervisedMethod", "SwitchKD", "Terms"]
