"""Students and teachers: stock LLaVA models, and the four steps of their forward."""

from switchkd.lazy import lazily

__all__ = [
    "assemble_llava",
    "freeze",
    "load_llava",
    "same_inputs",
    "shared_vocab",
]

__getattr__ = lazily(
    __name__,
    {
        "assemble_llava": "llava",
        "freeze": "llava",
        "load_llava": "llava",
        "same_inputs": "pair",
        "shared_vocab": "pair",
    },
)
