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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedModel

from switchkd.models.pathway import pathway_of
from switchkd.plan.fakes import WithoutData
from switchkd.plan.repeats import Repeated

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
ATTENTION = {operation for operation in FORMULAS if "scaled_dot_product" in str(operation)}


@dataclass(frozen=True)
class StepCost:
    """One forward and backward of a batch.

    flops: (part, pass) -> floating-point operations, two for a multiplication with its addition; a pass is "forward",
    "backward" or "recompute". memory: bytes alive at the peak by what they are for, gradients among them, weights and
    optimizer not. accumulating: the same where gradients of an earlier micro-batch are there from the start.
    growing: what of `flops` the language models do at all tokens of a sample: with their weights, and in attention.
    """

    flops: dict[tuple[str, str], int]
    memory: dict[str, int]
    accumulating: dict[str, int]
    growing: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    def flops_at(self, tokens: int, of: int) -> dict[tuple[str, str], int] | None:
        """`flops` if each sample had `tokens` in place of `of`, with as many images and answer tokens.

        A language model's products with its weights grow as the tokens do, its attention as their square; nothing else
        depends on them. None where no kernel of attention was seen, so that the two cannot be told apart.
        """
        if not any(squared for _, squared in self.growing.values()):
            return None
        flops = dict(self.flops)
        for key, (linear, squared) in self.growing.items():
            flops[key] += linear * tokens // of - linear + squared * tokens**2 // of**2 - squared
        return flops


def part_parameters(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Part -> (trained, frozen) parameters; the head counts with the language model, once where it is tied."""
    path = pathway_of(model)
    counts = {part: [0, 0] for part in PARTS.values()}
    for name, parameter in model.named_parameters():
        part = next(
            (PARTS[part] for part, prefix in path.parts.items() if name.startswith(f"{prefix}.")), LANGUAGE_MODEL
        )
        counts[part][not parameter.requires_grad] += parameter.numel()
    return {part: (trained, frozen) for part, (trained, frozen) in counts.items()}


def step_cost(
    method: nn.Module, batch: dict[str, Tensor], *, autocast: bool = False, repeated: Sequence[Repeated] = ()
) -> StepCost:
    """Forward and backward of `method` on `batch`. autocast: the forward computes in bfloat16, as Trainer's does.
    repeated: layers of its models that stand for several (`shorten`).

    Real models and batches are measured in the same way, by running them.
    """
    method.train()
    meter = _Meter(method)
    with meter, meter.attributed(method), meter.repeating(repeated):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = method(**batch).loss
        meter.at(HEADS)
        loss.backward()
    gradients = meter.live[GRADIENTS]
    for parameter in method.parameters():
        parameter.grad = None
    accumulating = {**meter.peak(gradients=False), GRADIENTS: gradients}
    return StepCost(dict(meter.flops), meter.peak(), accumulating, meter.growing)


@dataclass
class _Storage:
    """`times`: how many equal ones it stands for."""

    size: int
    label: str
    reference: weakref.ref
    times: int = 1


@dataclass
class _Span:
    """The time in which a repeated layer runs, forward or backward. start: the live bytes at its begin; made: the keys
    of the storages of this time; once: freed bytes that are none of the layer's own, so that they are freed once.
    highest: the most bytes alive in it, and by part, as the last of the layers has it; the same without gradients."""

    times: int
    start: Counter[str]
    made: set[int] = field(default_factory=set)
    once: Counter[str] = field(default_factory=Counter)
    highest: dict[bool, tuple[int, dict[str, int]]] = field(default_factory=dict)

    def freed_once(self, storage: _Storage) -> None:
        """The first of the layers frees it; to the last one it was never there."""
        self.once[storage.label] -= storage.size
        for gradients, (total, live) in self.highest.items():
            counted = storage.size if gradients or storage.label != GRADIENTS else 0
            live = {**live, storage.label: live[storage.label] - storage.size}
            self.highest[gradients] = total - counted, live


class _Meter(WithoutData):
    """Counts the arithmetic by (part, pass), and the live bytes by part.

    While a layer runs that stands for n, its arithmetic counts n times, and memory is that of the first of the n. When
    it has run, what it left behind and freed counts n - 1 times more. The most that any of the n had alive is the first
    one's or the last one's: each begins with what the one before it left, and that grows or falls evenly. What goes
    from layer to layer, the states and their gradients, is the input of each and counts so.
    """

    def __init__(self, method: nn.Module):
        super().__init__()
        self.part, self.reads = HEADS, False  # reads: a language model runs, over all tokens of the samples
        self.flops: Counter[tuple[str, str]] = Counter()
        self.growing: dict[tuple[str, str], tuple[int, int]] = {}
        self.live: Counter[str] = Counter()
        self._total = 0
        self._highest: dict[bool, tuple[int, dict[str, int]]] = {True: (0, {}), False: (0, {})}  # by "with gradients"
        self._span: _Span | None = None
        self._storages: dict[int, _Storage] = {}
        self._static = {tensor.untyped_storage()._cdata for tensor in (*method.parameters(), *method.buffers())}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.prim.device.default:  # most calls
            return out
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None:
            kind = "forward" if not in_backward() else "recompute" if torch.is_grad_enabled() else "backward"
            flops = (self._span.times if self._span else 1) * formula(*args, **(kwargs or {}), out_val=out)
            self.flops[self.part, kind] += flops
            if self.reads:
                linear, squared = self.growing.get((self.part, kind), (0, 0))
                attention = flops if func.overloadpacket in ATTENTION else 0
                self.growing[self.part, kind] = linear + flops - attention, squared + attention
        cast = func is aten._to_copy.default and isinstance(args[0], nn.Parameter)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._hold(leaf, CASTS if cast else self.part)
        return out

    def at(self, part: str, reads: bool = False) -> None:
        """What comes now is this part's."""
        self.part, self.reads = part, reads

    @contextlib.contextmanager
    def attributed(self, method: nn.Module) -> Iterator[None]:
        """While this is open, `part` follows the modules of student and teacher, forward by their calls and backward by
        the gradients that reach their outputs."""
        hooks = []

        def follow(module: nn.Module, part: str, reads: bool) -> None:
            def name() -> str:
                return SWITCH if part == TEACHER and torch.is_grad_enabled() else part

            def enter(*_) -> None:
                self.at(name(), reads)

            def leave(_, __, output) -> None:
                own, self.reads = name(), False
                for leaf in tree_leaves(output):
                    if isinstance(leaf, Tensor) and leaf.requires_grad:
                        leaf.register_hook(lambda _: self.at(own, reads))

            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_forward_hook(leave))

        for role in ("student", "teacher"):
            model = getattr(method, role, None)
            if model is not None:
                path = pathway_of(model)
                for name, part in PARTS.items():
                    follow(path.part(name), part if role == "student" else TEACHER, name == "language_model")
                hooks.append(path.head.register_forward_pre_hook(lambda *_: self.at(HEADS)))
        for parameter in method.parameters():
            if parameter.requires_grad:
                hooks.append(parameter.register_post_accumulate_grad_hook(lambda p: self._relabel(p.grad, GRADIENTS)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def repeating(self, repeated: Sequence[Repeated]) -> Iterator[None]:
        """While this is open, what a repeated layer does counts as often as it stands for.

        Forward it runs until the following layer begins, for only then its caller has let go of its input; backward
        from the gradient of its output to that of its input.
        """
        hooks = []

        def follow(each: Repeated) -> None:
            def begin(_, args) -> None:
                if in_backward():  # recomputed
                    return
                self._begin(each.times, args[0])
                if args[0].requires_grad:
                    args[0].register_hook(self._end)

            def end(_, args) -> None:
                if in_backward():
                    return
                self._end(args[0])
                if args[0].requires_grad:
                    args[0].register_hook(lambda gradient: self._begin(each.times, gradient))

            hooks.append(each.layer.register_forward_pre_hook(begin))
            hooks.append(each.following.register_forward_pre_hook(end))

        for each in repeated:
            follow(each)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def peak(self, gradients: bool = True) -> dict[str, int]:
        """Live bytes by part when most were alive, counted with or without gradients."""
        return dict(self._highest[gradients][1])

    def _begin(self, times: int, given: Tensor) -> None:
        """A repeated layer begins, with `given` of the layer before it."""
        self._storages[given.untyped_storage()._cdata].times = times
        self._span = _Span(times, self.live.copy())
        self._note()

    def _end(self, handed_on: Tensor) -> None:
        """It has run, and hands this on to the next one."""
        span, self._span = self._span, None
        again = span.times - 1
        left = {part: self.live[part] - span.start[part] - span.once[part] for part in self.live}
        for key in span.made & self._storages.keys():
            self._storages[key].times = span.times
        self._storages[handed_on.untyped_storage()._cdata].times = 1
        for gradients, (total, live) in span.highest.items():
            more = {part: again * size for part, size in left.items()}
            total += sum(size for part, size in more.items() if gradients or part != GRADIENTS)
            if total > self._highest[gradients][0]:
                self._highest[gradients] = total, {part: live.get(part, 0) + size for part, size in more.items()}
        for part, size in left.items():
            self._add(part, again * size)

    def _hold(self, tensor: Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages or key in self._static:
            return
        reference = weakref.ref(storage, lambda _: self._free(key))
        self._storages[key] = _Storage(storage.nbytes(), label, reference)
        if self._span:
            self._span.made.add(key)
        self._add(label, storage.nbytes())

    def _free(self, key: int) -> None:
        storage, span = self._storages.pop(key), self._span
        if span and storage.times == 1 and key not in span.made:
            span.freed_once(storage)
        if span:
            span.made.discard(key)
        self._add(storage.label, -storage.size * (1 if span else storage.times))

    def _relabel(self, tensor: Tensor, label: str) -> None:
        storage = self._storages[tensor.untyped_storage()._cdata]
        size = storage.size * (1 if self._span else storage.times)
        self.live[storage.label] -= size
        self.live[label] += size
        storage.label = label

    def _add(self, label: str, size: int) -> None:
        self.live[label] += size
        self._total += size
        if size > 0:
            self._note()

    def _note(self) -> None:
        """Keeps what is alive if it is the most so far, of the whole step and of the span."""
        for highest in (self._highest, *([self._span.highest] if self._span else [])):
            for gradients in (True, False):
                total = self._total - (0 if gradients else self.live[GRADIENTS])
                if gradients not in highest or total > highest[gradients][0]:
                    highest[gradients] = total, dict(self.live)


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
