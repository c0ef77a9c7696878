"""Kinds of GPU, and what a run keeps on each of them whatever its batches: weights, optimizer, teacher, buckets."""

from __future__ import annotations

from dataclasses import dataclass

ENGINES = ("ddp", "zero2", "zero3")
# DeepSpeed's defaults, in elements: gradients are reduced from a buffer of this size; ZeRO-3 gathers up to so many
# parameters at a time.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
# Beside a run's own tensors: CUDA's context, workspaces of cuBLAS and NCCL, gaps. Our allowance, not measured.
ALLOWANCE = 3 << 29


@dataclass(frozen=True)
class Gpu:
    """`tflops`: dense bfloat16 peak with float32 accumulation, in 1e12 operations a second, from the data sheet.
    `gibibytes`: what torch sees of its memory."""

    name: str
    tflops: float
    gibibytes: float

    @property
    def memory(self) -> int:
        """Bytes."""
        return int(self.gibibytes * 2**30)


GPUS = {
    "a100-40": Gpu("A100 40GB", 312, 39.4),
    "a100": Gpu("A100 80GB", 312, 79.1),
    "h100": Gpu("H100 SXM", 989, 79.1),
    "h200": Gpu("H200", 989, 139.8),
    "l40s": Gpu("L40S", 362, 44.4),
    "rtx4090": Gpu("RTX 4090", 165, 23.6),
    "rtx3090": Gpu("RTX 3090", 71, 23.6),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of `GPUS`, however it is written ("H100", "RTX 4090"); ValueError naming the known ones."""
    plain = {key.replace("-", ""): gpu for key, gpu in GPUS.items()}
    gpu = plain.get(name.lower().replace("-", "").replace(" ", "").replace("_", ""))
    if gpu is None:
        raise ValueError(f"--gpu is {name}: known are {', '.join(GPUS)}")
    return gpu


def kept_memory(
    *, parameters: int, trained: int, teacher: int, engine: str, gpus: int, bf16: bool, teacher_bf16: bool
) -> dict[str, int]:
    """Bytes by what they are for, on each of `gpus` GPUs, from the first step to the last.

    parameters, trained: the student's, all and trained; teacher: its parameters, 0 without one. DDP keeps the student
    in float32, AdamW's two moments beside it, and with more than one GPU a bucket copy of the gradients. DeepSpeed
    keeps it in bfloat16 (with `bf16`) and shares float32 copies and moments over the GPUs; ZeRO-3 shares all weights,
    the teacher's too, and gathers what it computes with.
    """
    width, teacher_width = (2 if bf16 else 4), (2 if teacher_bf16 else 4)
    if engine == "ddp":
        return {
            "student weights": 4 * parameters,
            "AdamW": 8 * trained,
            "teacher weights": teacher_width * teacher,
            "DDP's buckets": 4 * trained * (gpus > 1),
        }
    share = gpus if engine == "zero3" else 1
    kept = {
        "student weights": width * parameters // share,
        "AdamW": 12 * trained // gpus,
        "teacher weights": teacher_width * teacher // share,
        "DeepSpeed's buckets": width * REDUCE_BUCKET,
    }
    if engine == "zero3":
        kept["gathered weights"] = width * min(parameters + teacher, LIVE_PARAMETERS)
    return kept


def shared_gradients(gradients: int, engine: str, gpus: int) -> int:
    """Bytes of the gradients that stay on one GPU: DeepSpeed hands each its share as soon as they are there."""
    return gradients if engine == "ddp" else gradients // gpus
