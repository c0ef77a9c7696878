"""What one step of a method costs in arithmetic and memory, without its weights.

No formula of a transformer is written here. Student and teacher are built as torch's fake tensors (shape, type and
device, no data), and the method's own `forward` and backward run on them with real ids, masks and labels, while a
dispatch mode counts the arithmetic of every operation and the bytes of every storage that is alive. So frozen parts,
LoRA, autocast, chunks of logits, recomputed activations and the switch's way back through the frozen teacher cost what
the code makes them cost. What a GPU adds, its context and its libraries' workspaces, is not in it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.initialization import no_init_weights

from switchkd.models.pathway import pathway_of

aten = torch.ops.aten
Module = TypeVar("Module", bound=nn.Module)

TOWER, PROJECTOR, LANGUAGE_MODEL = "vision tower", "projector", "language model"
TEACHER, SWITCH, HEADS = "teacher", "switch", "heads and losses"
GRADIENTS, CASTS = "gradients", "weights cast to bfloat16"

# torch counts attention by its CUDA kernels only; fake tensors of the CPU take this one, of the same arithmetic.
FORMULAS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(
        grad.shape, q.shape, k.shape, v.shape
    ),
}
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


@dataclass(frozen=True)
class StepCost:
    """One forward and backward of a batch.

    flops: (part, pass) -> floating-point operations, two for a multiplication with its addition; a pass is "forward",
    "backward" or "recompute". memory: bytes alive at the peak by what they are for, gradients among them, weights and
    optimizer not. accumulating: the same where gradients of an earlier micro-batch are there from the start.
    """

    flops: dict[tuple[str, str], int]
    memory: dict[str, int]
    accumulating: dict[str, int]


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


def part_parameters(model: LlavaForConditionalGeneration) -> dict[str, tuple[int, int]]:
    """Part -> (trained, frozen) parameters; the head counts with the language model, once where it is tied."""
    counts = {name: [0, 0] for name in (TOWER, PROJECTOR, LANGUAGE_MODEL)}
    for name, parameter in model.named_parameters():
        part = TOWER if ".vision_tower." in name else PROJECTOR if ".multi_modal_projector." in name else LANGUAGE_MODEL
        counts[part][not parameter.requires_grad] += parameter.numel()
    return {part: (trained, frozen) for part, (trained, frozen) in counts.items()}


def step_cost(method: nn.Module, batch: dict[str, Tensor], *, autocast: bool = False) -> StepCost:
    """Forward and backward of `method` on `batch`. autocast: the forward computes in bfloat16, as Trainer's does.

    Real models and batches are measured in the same way, by running them.
    """
    method.train()
    meter = _Meter(method)
    with meter, meter.attributed(method):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = method(**batch).loss
        meter.part = HEADS
        loss.backward()
    gradients = meter.live[GRADIENTS]
    for parameter in method.parameters():
        parameter.grad = None
    return StepCost(dict(meter.flops), dict(meter.peak), {**meter.peak_without_gradients, GRADIENTS: gradients})


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


class _Meter(WithoutData):
    """Counts the arithmetic by (part, pass), and the live bytes by part."""

    def __init__(self, method: nn.Module):
        super().__init__()
        self.part = HEADS
        self.flops: Counter[tuple[str, str]] = Counter()
        self.live: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.peak_without_gradients: dict[str, int] = {}
        self._total = self._highest = self._highest_without = 0
        self._storages: dict[int, tuple[int, str, weakref.ref]] = {}
        self._static = {tensor.untyped_storage()._cdata for tensor in (*method.parameters(), *method.buffers())}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None:
            backward = torch._C._current_graph_task_id() != -1
            kind = "forward" if not backward else "recompute" if torch.is_grad_enabled() else "backward"
            self.flops[self.part, kind] += formula(*args, **(kwargs or {}), out_val=out)
        cast = func is aten._to_copy.default and isinstance(args[0], nn.Parameter)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._hold(leaf, CASTS if cast else self.part)
        return out

    @contextlib.contextmanager
    def attributed(self, method: nn.Module) -> Iterator[None]:
        """While this is open, `part` follows the modules of student and teacher, forward by their calls and backward by
        the gradients that reach their outputs."""
        hooks = []

        def follow(module: nn.Module, part: str) -> None:
            def name() -> str:
                return SWITCH if part == TEACHER and torch.is_grad_enabled() else part

            def enter(*_) -> None:
                self.part = name()

            def leave(_, __, output) -> None:
                own = name()
                for leaf in tree_leaves(output):
                    if isinstance(leaf, Tensor) and leaf.requires_grad:
                        leaf.register_hook(lambda _: setattr(self, "part", own))

            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_forward_hook(leave))

        for role in ("student", "teacher"):
            model = getattr(method, role, None)
            if model is not None:
                for part, module in _parts(model).items():
                    follow(module, part if role == "student" else TEACHER)
                hooks.append(model.lm_head.register_forward_pre_hook(lambda *_: setattr(self, "part", HEADS)))
        for parameter in method.parameters():
            if parameter.requires_grad:
                hooks.append(parameter.register_post_accumulate_grad_hook(lambda p: self._relabel(p.grad, GRADIENTS)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hold(self, tensor: Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages or key in self._static:
            return
        reference = weakref.ref(storage, lambda _: self._free(key))
        self._storages[key] = storage.nbytes(), label, reference
        self._add(label, storage.nbytes())

    def _free(self, key: int) -> None:
        size, label, _ = self._storages.pop(key)
        self._add(label, -size)

    def _relabel(self, tensor: Tensor, label: str) -> None:
        key = tensor.untyped_storage()._cdata
        size, old, reference = self._storages[key]
        self._storages[key] = size, label, reference
        self.live[old] -= size
        self.live[label] += size

    def _add(self, label: str, size: int) -> None:
        self.live[label] += size
        self._total += size
        if self._total > self._highest:
            self._highest, self.peak = self._total, dict(self.live)
        without = self._total - self.live[GRADIENTS]
        if without > self._highest_without:
            self._highest_without, self.peak_without_gradients = without, dict(self.live)


def _parts(model: LlavaForConditionalGeneration) -> dict[str, nn.Module]:
    inner = model.model
    return {TOWER: inner.vision_tower, PROJECTOR: inner.multi_modal_projector, LANGUAGE_MODEL: inner.language_model}


def _as_positions(indices: list) -> list:
    """Real masks as lists of positions, whose number is known."""
    positions = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool
        positions += index.nonzero().unbind(1) if is_mask else [index]
    return positions
