"""Models and batches without data: torch's fake tensors, which have shape, type and device and no values.

A method is built of them and run on them as it is; `WithoutData` answers what its code asks of their values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.initialization import no_init_weights

from switchkd.models.pathway import pathway_of

aten = torch.ops.aten
Module = TypeVar("Module", bound=nn.Module)

# One for all: tensors of two modes do not mix.
FAKE_MODE = FakeTensorMode(allow_non_fake_inputs=True)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


@dataclass(frozen=True)
class Batch:
    """Samples of one image each, padded to one length. `tokens`: of a sample, its visual tokens and padding among them.
    `answers`: of these, how many are answer tokens."""

    samples: int
    tokens: int
    answers: int

    def tensors(self, student: LlavaForConditionalGeneration) -> dict[str, Tensor]:
        """The batch as a method's `forward` takes it: real ids and labels, fake mask and pixels.

        Of a fake mask nobody can say that it is all ones, so attention takes the kernel of a padded batch. Raises
        ValueError where the visual tokens leave no room for the answer.
        """
        vision, visual = student.config.vision_config, pathway_of(student).visual_token_count
        if self.tokens < visual + self.answers:
            raise ValueError(
                f"a sample of {self.tokens} tokens does not hold {visual} visual tokens and {self.answers} answer "
                "tokens: make it longer"
            )
        shape = self.samples, self.tokens
        ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
        ids[:, :visual] = student.config.image_token_id
        labels[:, self.tokens - self.answers :] = 0
        with FAKE_MODE:
            mask = torch.ones(shape, dtype=torch.long)
            pixels = torch.empty(self.samples, vision.num_channels, vision.image_size, vision.image_size)
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "labels": labels}


def fake_llava(config: LlavaConfig, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """The model of `config` without data; it can be frozen and wrapped by a method as a real one."""
    return fake(meta_llava(config, dtype))


def meta_llava(config: LlavaConfig, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """The same on the meta device, where it takes LoRA too; `fake` then makes it ready to run."""
    with torch.device("meta"), no_init_weights():
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    model.tie_weights()  # left out together with the initial values
    return model


def fake(model: Module) -> Module:
    """The same model with fake tensors of the CPU for those of the meta device, in place: autocast and the choice of an
    attention kernel go by the device, and the meta device has neither."""
    fakes: dict[int, Tensor] = {}  # tied ones stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    if id(tensor) not in fakes:
                        with FAKE_MODE:
                            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                        trained = tensor.requires_grad
                        fakes[id(tensor)] = nn.Parameter(empty, trained) if tensors is module._parameters else empty
                    tensors[name] = fakes[id(tensor)]
    return model


class WithoutData(TorchDispatchMode):
    """Answers what code asks of fake tensors' values: a method can be built of fake models inside this context.

    equal: whether two tensors are equal. "Is any of it so?" no. "How many of the leading entries?" half of what the
    last topk gave: of 64 candidates, the latest knee of a batch lies at about 30. Masks that are real pick out of fake
    tensors.
    """

    def __init__(self, equal: bool = False):
        super().__init__()
        self.equal = equal
        self._leading = 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], FakeTensor):
            if func is torch.ops.prim.device.default:
                return args[0].fake_device  # two of three calls; answered here, the whole is faster by a third
            if func is aten._local_scalar_dense.default:
                return False if args[0].dtype == torch.bool else self._leading
            if func is aten.equal.default:
                return self.equal
            if func is aten.topk.default:
                self._leading = max(args[1] // 2, 1)
            if func in INDEXING:
                args = (args[0], _as_positions(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


def _as_positions(indices: list) -> list:
    """Real masks as lists of positions, whose number is known."""
    positions = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool
        positions += index.nonzero().unbind(1) if is_mask else [index]
    return positions
