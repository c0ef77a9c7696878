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

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlavaForConditionalGeneration

from switchkd.models.pathway import pathway_of
from switchkd.plan.fakes import WithoutData

aten = torch.ops.aten

TOWER, PROJECTOR, LANGUAGE_MODEL = "vision tower", "projector", "language model"
PARTS = {"vision_tower": TOWER, "projector": PROJECTOR, "language_model": LANGUAGE_MODEL}
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


def part_parameters(model: LlavaForConditionalGeneration) -> dict[str, tuple[int, int]]:
    """Part -> (trained, frozen) parameters; the head counts with the language model, once where it is tied."""
    path = pathway_of(model)
    counts = {part: [0, 0] for part in PARTS.values()}
    for name, parameter in model.named_parameters():
        part = next(
            (PARTS[part] for part, prefix in path.parts.items() if name.startswith(f"{prefix}.")), LANGUAGE_MODEL
        )
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
                path = pathway_of(model)
                for name, part in PARTS.items():
                    follow(path.part(name), part if role == "student" else TEACHER)
                hooks.append(path.head.register_forward_pre_hook(lambda *_: setattr(self, "part", HEADS)))
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
