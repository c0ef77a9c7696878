"""Training arguments: transformers' own, with the settings that a method in `DistillTrainer` needs."""

from __future__ import annotations

import os
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from switchkd.config import TrainConfig
from switchkd.training.processes import on_cpu, process_state

# What decides the weights a run ends with: a resume under other values is refused.
DECIDING = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("world_size", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("weight_decay", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("seed", "data_seed", "bf16", "fp16", "dataloader_drop_last"),
)
# What DistillTrainer relies on, and what it cannot do.
REQUIRED = {
    "remove_unused_columns": False,
    "average_tokens_across_devices": True,
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "auto_find_batch_size": False,
    "save_only_model": False,
    "dataloader_persistent_workers": False,
}


def training_arguments(
    config: TrainConfig, output_dir: str | os.PathLike, *, seed: int = 0, **overrides: Any
) -> TrainingArguments:
    """`TrainingArguments` of one run, checkpoints in `output_dir`; `overrides` go to `TrainingArguments` as
    they are. `config` has its steps (`TrainConfig.settled`).

    Trainer sets `seed` only when it is built: call `transformers.set_seed(seed)` before building a model that
    starts from random weights. Where torch sees no accelerator, or ACCELERATE_USE_CPU is set, the run is on the
    CPU: torchrun then gives DDP over gloo, and a DeepSpeed launch works too.
    """
    if config.steps is None or config.global_batch_size:
        raise ValueError("train.steps is not known yet: pass config.settled(samples, processes)")
    cpu = on_cpu()
    if cpu and (overrides.get("deepspeed") or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")):
        # Without a gloo group made first, DeepSpeed sees all ranks and Trainer sees one: the same data on
        # every rank. What an earlier stage of this process configured goes, as TrainingArguments does itself.
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        AcceleratorState._reset_state(reset_partial_state=True)
        process_state()
        overrides = {"accelerator_config": {"use_configured_state": True}, **overrides}
    settings = {
        "max_steps": config.steps,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "learning_rate": config.lr,
        "lr_scheduler_type": config.scheduler,
        "warmup_steps": config.warmup_ratio,  # below 1 it is a share of the steps
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "bf16": config.bf16,
        "logging_steps": config.logging_steps,
        "logging_nan_inf_filter": False,  # on, it hides a loss that is not finite
        "save_steps": config.checkpoint_every,
        "save_strategy": "steps" if config.checkpoint_every else "no",
        "save_total_limit": config.keep_checkpoints,
        "remove_unused_columns": False,  # the collator sees the sample ids
        "ddp_find_unused_parameters": False,
        "dataloader_num_workers": (0 if cpu else 4) if config.data_workers is None else config.data_workers,
        # Persistent ones draw from torch's random state once a run instead of once an epoch: no exact resume.
        "dataloader_persistent_workers": False,
        "dataloader_pin_memory": not cpu,
        "use_cpu": cpu,
        "report_to": "none",
        "seed": seed,
    }
    return TrainingArguments(output_dir=str(output_dir), **{**settings, **overrides})


def deciding_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The arguments that decide the weights a run ends with, by name."""
    return {name: getattr(args, name) for name in DECIDING}


def check_arguments(args: TrainingArguments) -> None:
    """Raise ValueError for what would train silently wrong, or could not be resumed."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if args.world_size != ranks:
        raise ValueError(
            f"{ranks} processes were launched but this one trains as 1 of {args.world_size}, on all data: "
            "make the arguments with training_arguments, or launch with a file of recipes/accelerate"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs: launch one process each (accelerate launch --num_processes "
            f"{args.n_gpu}), or show it one (CUDA_VISIBLE_DEVICES=0)"
        )
    if args.fsdp:
        raise ValueError(
            "fsdp is set: DistillTrainer trains with DDP or ZeRO-2 (recipes/accelerate), and with ZeRO-3 one stage "
            "whose models are built before the arguments"
        )
    for name, value in REQUIRED.items():
        if getattr(args, name) != value:
            raise ValueError(f"{name} is {getattr(args, name)}, DistillTrainer needs {value}")
