"""A method is one nn.Module that holds its student and its frozen teachers; forward(batch) -> Terms."""

from switchkd.lazy import lazily

__all__ = [
    "SupervisedMethod",
    "SwitchKD",
    "Terms",
]

__getattr__ = lazily(
    __name__,
    {
        "SupervisedMethod": "supervised",
        "SwitchKD": "switch_kd",
        "Terms": "terms",
    },
)
