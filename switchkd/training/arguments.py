"""Training arguments: transformers' own, with the settings that a method in `DistillTrainer` needs."""

from __future__ import annotations

import difflib
import importlib.util
import os
from dataclasses import fields
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments, get_scheduler

from switchkd.training.config import REQUIRED, TrainConfig
from switchkd.training.processes import on_cpu, process_state
from switchkd.training.rates import milestone_steps

# What decides the weights a run ends with: a resume under other values is refused.
DECIDING = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("world_size", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("weight_decay", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("torch_compile", "seed", "data_seed", "bf16", "fp16", "dataloader_drop_last"),
)

# Modules that the optimizers are in; of all others bitsandbytes.
MODULES = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adagrad", "rmsprop", "sgd"), "torch"),
    "adafactor": "transformers",
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), "torchao"),
    "adamw_anyprecision": "torchdistx",
    "grokadamw": "grokadamw",
    "stable_adamw": "optimi",
}


def training_arguments(
    config: TrainConfig, output_dir: str | os.PathLike, *, seed: int = 0, **overrides: Any
) -> TrainingArguments:
    """`TrainingArguments` of one run, checkpoints in `output_dir`; `overrides`, and over them `config.extra`, go to
    `TrainingArguments` as they are. `config` has its steps (`TrainConfig.settled`) and is checked (`check_settings`).

    Trainer sets `seed` only when it is built: call `transformers.set_seed(seed)` before building a model that
    starts from random weights. Where torch sees no accelerator, or ACCELERATE_USE_CPU is set, the run is on the
    CPU: torchrun then gives DDP over gloo, and a DeepSpeed launch works too.
    """
    if config.steps is None or config.global_batch_size:
        raise ValueError("train.steps is not known yet: pass config.settled(samples, processes)")
    check_settings(config)
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
        "optim": config.optimizer,
        "learning_rate": config.lr,
        **_schedule(config),
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
        "report_to": list(config.report_to) or "none",
        "torch_compile": config.torch_compile,
        "eval_strategy": "steps" if config.eval_every else "no",
        "eval_steps": config.eval_every or None,
        "seed": seed,
    }
    return TrainingArguments(output_dir=str(output_dir), **{**settings, **overrides, **config.extra})


def _schedule(config: TrainConfig) -> dict[str, Any]:
    """Trainer's schedule; milestones are in the keyword arguments of its constant one (`DistillTrainer` reads them)."""
    if config.scheduler != "multistep":
        return {"lr_scheduler_type": config.scheduler}
    steps = milestone_steps(config.milestones, config.steps)
    factor = 0.1 if config.milestone_factor is None else config.milestone_factor
    return {
        "lr_scheduler_type": "constant_with_warmup",
        "lr_scheduler_kwargs": {"milestones": steps, "factor": factor},
    }


def check_settings(config: TrainConfig, section: str = "train") -> None:
    """Raise ValueError for what only shows when a stage begins to train: a name in `extra` that transformers does not
    know, a package that is not installed, a schedule that lacks its settings. `section`: where `config` stands."""
    known = {each.name for each in fields(TrainingArguments)}
    for name in config.extra:
        if name not in known and name not in REQUIRED:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{section}.extra sets {name}, which TrainingArguments does not have{meant}")
    for name in config.report_to:
        modules = ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,)
        if not any(importlib.util.find_spec(module) for module in modules):
            raise ValueError(
                f"{section}.report_to names {name}, which is not installed: pip install {name}, or drop it"
            )
    module = MODULES.get(config.optimizer, "bitsandbytes")
    if not importlib.util.find_spec(module):
        raise ValueError(
            f"{section}.optimizer is {config.optimizer}, which needs {module}: install it, or take another optimizer"
        )
    _check_schedule(config, section)


def _check_schedule(config: TrainConfig, section: str) -> None:
    if config.scheduler == "multistep":
        return
    options = config.extra.get("lr_scheduler_kwargs")
    try:
        get_scheduler(config.scheduler, torch.optim.SGD([torch.zeros(1)], lr=1.0), 1, 10, options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{section}.scheduler is {config.scheduler} with lr_scheduler_kwargs {options}: {error}; give "
            f"{section}.extra.lr_scheduler_kwargs what it takes"
        ) from error


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
    for name, (value, why) in REQUIRED.items():
        if getattr(args, name, value) != value:
            raise ValueError(f"{name} is {getattr(args, name)}, DistillTrainer needs {value}: {why}")
