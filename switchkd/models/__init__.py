"""Students and teachers: stock LLaVA models, and the four steps of their forward."""

from switchkd.models.llava import assemble_llava, freeze, load_llava
from switchkd.models.pair import same_inputs, shared_vocab

__all__ = ["assemble_llava", "freeze", "load_llava", "same_inputs", "shared_vocab"]
