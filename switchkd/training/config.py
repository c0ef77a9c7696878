"""How a stage is trained: the `train` section of its configuration."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from switchkd.config import at_least

# Trainer's own but those that need the layers of one model (galore, apollo), a loop of their own (lomo), two modes of
# the weights (schedule-free) or another machine (xla, npu).
Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adafactor",
    "adagrad",
    "rmsprop",
    "sgd",
    "adamw_anyprecision",
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "grokadamw",
    "stable_adamw",
]
# Trainer's own but those that follow a measurement (reduce_lr_on_plateau, greedy) and constant, which is
# constant_with_warmup without a warm-up; multistep is ours.
Scheduler = Literal[
    "cosine",
    "linear",
    "constant_with_warmup",
    "multistep",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
Report = Literal["tensorboard", "wandb", "trackio"]

# TrainingArguments that a field decides, with that field.
DECIDED = {
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_sampling_strategy": "group_by_length",
    "learning_rate": "lr",
    "optim": "optimizer",
    "lr_scheduler_type": "scheduler",
    "warmup_steps": "warmup_ratio",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "logging_steps": "logging_steps",
    "eval_strategy": "eval_every",
    "eval_steps": "eval_every",
    "metric_for_best_model": "keep_best",
    "load_best_model_at_end": "keep_best",
    "greater_is_better": "keep_best",
    "save_strategy": "checkpoint_every",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep_checkpoints",
    "dataloader_num_workers": "data_workers",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "bf16": "bf16",
    "torch_compile": "torch_compile",
    "report_to": "report_to",
}
# TrainingArguments that have to keep a value, which is mostly Trainer's own, and why.
REQUIRED: dict[str, tuple[Any, str]] = {
    "remove_unused_columns": (False, "the collator sees all fields of a sample"),
    "average_tokens_across_devices": (True, "a loss is divided by the items of all ranks"),
    "load_best_model_at_end": (False, "keep_best does it, with checkpoints of the method"),
    "metric_for_best_model": (None, "keep_best names it"),
    "push_to_hub": (False, "a checkpoint is the method's, not a model for the Hub"),
    "auto_find_batch_size": (False, "another batch size would be another run"),
    "save_only_model": (False, "a run could not go on without its optimizer's state"),
    "dataloader_persistent_workers": (False, "they draw a seed once a run, so that a resumed run would differ"),
    "dataloader_in_order": (True, "batches in the order of their arrival cannot be repeated"),
    "ignore_data_skip": (False, "a resumed run would see samples twice"),
    "logging_nan_inf_filter": (False, "it hides a loss that is not finite"),
    "label_smoothing_factor": (0.0, "the loss is the method's own"),
    "use_liger_kernel": (False, "it knows transformers models alone, and would change nothing"),
    "neftune_noise_alpha": (None, "it knows transformers models alone"),
    "torch_empty_cache_steps": (None, "the trainer's step does not do it"),
    "bf16_full_eval": (False, "evaluation computes as training does"),
    "fp16_full_eval": (False, "evaluation computes as training does"),
    "enable_jit_checkpoint": (False, "SIGTERM leaves a checkpoint anyway, on all ranks of one step"),
    "restore_callback_states_from_checkpoint": (False, "callbacks keep no state of their own"),
}
# TrainingArguments that another place decides.
ELSEWHERE = {
    "output_dir": "the run's out and name",
    "seed": "the run's seed",
    "use_cpu": "the environment variable ACCELERATE_USE_CPU",
    "resume_from_checkpoint": "the run's resume",
    "accelerator_config": "the files of recipes/accelerate",
    "parallelism_config": "the files of recipes/accelerate",
    "fsdp": "the files of recipes/accelerate",
    "fsdp_config": "the files of recipes/accelerate",
    "deepspeed": "the files of recipes/accelerate",
}


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, the same for every method."""

    steps: int | None = None
    """Optimizer steps; left out, `epochs` passes over the samples."""
    epochs: float = 1.0
    """Passes over the samples where `steps` is left out."""
    batch_size: int = 16
    """Samples of one process in one micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of one optimizer step; the items (answer tokens, boxes, pictures) of all of them weigh the same."""
    global_batch_size: int | None = None
    """Samples of one optimizer step over all processes, whatever their number: sets the accumulation steps."""
    group_by_length: bool = False
    """Batches of samples of about one length, in random order: less padding where lengths differ."""
    optimizer: Optimizer = "adamw_torch_fused"
    """Optimizer, by the name that transformers' Trainer has for it; settings of its own go to extra (adam_beta2: 0.95,
    optim_args: momentum=0.9)."""
    lr: float = 1e-3
    """Peak learning rate."""
    part_lr: dict[str, float] = field(default_factory=dict)
    """Learning rates of parts of the model that have their own, such as {vision_tower: 2.0e-6}; the rest has lr."""
    lora_rank: int | None = None
    """Train `lora_parts` through LoRA adapters of this rank, merged at the end of the stage; left out, all weights."""
    lora_alpha: float | None = None
    """Scale of the adapters, alpha over rank; left out, twice the rank."""
    lora_dropout: float = 0.0
    """Dropout before each adapter."""
    lora_parts: tuple[str, ...] | None = None
    """Parts of the student that have adapters, their own weights frozen: vision_tower, projector, language_model; left
    out, the language model alone."""
    scheduler: Scheduler = "cosine"
    """How the rate falls after the warm-up, by Trainer's name (its settings go to extra.lr_scheduler_kwargs), or
    multistep: at each of the milestones."""
    milestones: tuple[float, ...] = ()
    """Steps after which multistep lowers the rate, or, below 1, shares of all steps: 0.6, 0.85."""
    milestone_factor: float | None = None
    """What multistep multiplies the rate by at a milestone; left out, 0.1."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the rate rises to its peak."""
    weight_decay: float = 0.0
    """Weight decay of the optimizer; norms and biases are not decayed."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    logging_steps: int = 10
    """Steps between two records in log.jsonl."""
    report_to: tuple[Report, ...] = ()
    """Where the records go besides log.jsonl: tensorboard (in the run's folder), wandb, trackio."""
    eval_every: int = 0
    """Steps between two evaluations of every term on held out samples, one more after the last step; 0: none."""
    eval_samples: int | None = None
    """Training samples that are held out for it, spread evenly over the set; left out, 100."""
    keep_best: str | None = None
    """Keep the checkpoint with the lowest value of this measurement (eval_loss, or eval_ and a term's name) and make
    the stage's model from it; left out, the model after the last step."""
    checkpoint_every: int = 100
    """Steps between two checkpoints; 0: none."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on the disk."""
    data_workers: int | None = None
    """Processes that decode and encode samples beside training; left out, 4 with a GPU and 0 without."""
    gradient_checkpointing: bool = False
    """Recompute the student's activations in backward: less memory, more time."""
    bf16: bool = False
    """Compute in bfloat16 under autocast, with the teacher's weights in bfloat16; the student's stay in float32,
    but under DeepSpeed, which trains them in bfloat16 with float32 copies."""
    attn_implementation: Attention | None = None
    """How attention is computed, in student and teacher; left out, what transformers takes by itself."""
    torch_compile: bool = False
    """Compile the method with torch.compile: minutes at the start, faster steps where shapes are few."""
    extra: dict[str, Any] = field(default_factory=dict)
    """TrainingArguments of transformers that have no field here, passed on as they are: {adam_beta2: 0.95}."""

    def __post_init__(self):
        least = {"steps": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "logging_steps": 1}
        least |= {"checkpoint_every": 0, "keep_checkpoints": 1, "weight_decay": 0, "max_grad_norm": 0}
        least |= {"global_batch_size": 1, "lora_rank": 1, "eval_every": 0, "eval_samples": 1}
        at_least("train", self, **least)
        for name, rate in {"lr": self.lr, **{f"part_lr.{part}": rate for part, rate in self.part_lr.items()}}.items():
            if rate <= 0:
                raise ValueError(f"train.{name} is {rate}, it must be above 0; freeze keeps a part as it is")
        for name in ("epochs", "lora_alpha", "milestone_factor"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"train.{name} is {value}, it must be above 0")
        if self.global_batch_size and self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"train.global_batch_size is {self.global_batch_size} and train.gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}: keep one of them, the first decides the second"
            )
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_dropout", "lora_parts"):
                if value := getattr(self, name):
                    raise ValueError(f"train.{name} is {value} but train.lora_rank is left out: give it too")
        if self.lora_parts == ():
            raise ValueError("train.lora_parts names no part: name one, or leave it out for the language model")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"train.lora_dropout is {self.lora_dropout}, it must be 0 or more and below 1")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"train.warmup_ratio is {self.warmup_ratio}, it must be 0 or more and below 1")
        self._check_milestones()
        self._check_evaluation()
        self._check_extra()

    def _check_milestones(self) -> None:
        given = list(self.milestones)
        if self.scheduler != "multistep":
            if given or self.milestone_factor is not None:
                raise ValueError(
                    f"train.milestones or train.milestone_factor is given and train.scheduler is {self.scheduler}, "
                    "which has none: choose multistep, or drop them"
                )
            return
        if not given:
            raise ValueError("train.scheduler is multistep without train.milestones: give the steps, or shares of them")
        if given != sorted(set(given)) or given[0] <= 0 or any(each > 1 and each != int(each) for each in given):
            raise ValueError(
                f"train.milestones is {given}: give steps, or shares of all steps below 1, each above the one before"
            )
        if given[0] < 1 <= given[-1]:
            raise ValueError(f"train.milestones is {given}: give either steps or shares of all steps, below 1")

    def _check_evaluation(self) -> None:
        if self.eval_samples is not None and not self.eval_every:
            raise ValueError(f"train.eval_samples is {self.eval_samples} without train.eval_every: give it too")
        if self.keep_best is None:
            return
        if not self.keep_best.startswith("eval_"):
            raise ValueError(f"train.keep_best is {self.keep_best}: name a measurement, eval_loss or eval_ and a term")
        if not self.eval_every or not self.checkpoint_every:
            raise ValueError(
                f"train.keep_best is {self.keep_best} with train.eval_every {self.eval_every} and "
                f"train.checkpoint_every {self.checkpoint_every}: it needs both above 0"
            )

    def _check_extra(self) -> None:
        for name, value in self.extra.items():
            if name in DECIDED:
                raise ValueError(f"train.extra sets {name}: set train.{DECIDED[name]} instead")
            if name in ELSEWHERE:
                raise ValueError(f"train.extra sets {name}: that is {ELSEWHERE[name]}")
            if name in REQUIRED and value != REQUIRED[name][0]:
                needed, why = REQUIRED[name]
                raise ValueError(f"train.extra sets {name} to {value}: it has to be {needed}, {why}")
        if self.scheduler in ("multistep", "constant_with_warmup") and "lr_scheduler_kwargs" in self.extra:
            raise ValueError(
                f"train.extra sets lr_scheduler_kwargs and train.scheduler is {self.scheduler}, which takes none: "
                "drop it"
            )

    def check_parts(self, parts: Collection[str], section: str = "train") -> None:
        """ValueError where `part_lr` of `section` names what is none of `parts`, with the nearest of them."""
        for part in self.part_lr:
            if part not in parts:
                near = difflib.get_close_matches(part, parts, n=1)
                meant = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(
                    f"{section}.part_lr names {part}, which is no part of the model; known are "
                    f"{', '.join(parts)}{meant}"
                )

    def settled(self, samples: int, processes: int = 1) -> TrainConfig:
        """The same with `steps` and `gradient_accumulation_steps` as they follow from the number of `samples` of the
        stage and of `processes`; epochs and global batch size are then spent.

        Raises ValueError where the global batch size is no multiple of a micro-batch of all processes.
        """
        micro_batch = self.batch_size * processes
        accumulation = self.gradient_accumulation_steps
        if self.global_batch_size:
            if self.global_batch_size % micro_batch:
                raise ValueError(
                    f"train.global_batch_size is {self.global_batch_size} but {processes} processes of "
                    f"train.batch_size {self.batch_size} make {micro_batch} samples at once: choose a batch size that "
                    "divides it"
                )
            accumulation = self.global_batch_size // micro_batch
        an_epoch = math.ceil(math.ceil(samples / micro_batch) / accumulation)  # each begins a step of its own
        steps = self.steps or max(1, math.ceil(self.epochs * an_epoch))
        return replace(self, steps=steps, gradient_accumulation_steps=accumulation, global_batch_size=None)
