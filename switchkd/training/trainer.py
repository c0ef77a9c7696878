"""The one trainer: a transformers Trainer for methods, modules whose forward returns Terms."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset
from transformers import (
    PrinterCallback,
    ProcessorMixin,
    ProgressCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from switchkd.methods.terms import Terms
from switchkd.training import checkpoints, zero
from switchkd.training.arguments import check_arguments, deciding_arguments
from switchkd.training.best import MeasureAndKeep, best_step, check_measured, take_best
from switchkd.training.contract import check_method, check_terms
from switchkd.training.evaluation import evaluation_loader, mean_terms
from switchkd.training.export import export_student
from switchkd.training.identity import data_identity, refuse_other_run
from switchkd.training.interrupt import Interrupted, StopAtSignal
from switchkd.training.logs import StepLog, TermsBar, TermSums
from switchkd.training.order import LengthGrouped, sample_lengths
from switchkd.training.rates import at_milestones, parameter_groups
from switchkd.training.reports import place_reports
from switchkd.training.resume import chosen_checkpoint, refuse_without_optimizer

# Trainer's own, for a model whose outputs are predictions.
UNUSED = ("compute_loss_func", "compute_metrics", "model_init", "preprocess_logits_for_metrics")


class DistillTrainer(Trainer):
    """Trains a method: `method.student` is what it makes, and `method(**batch)` returns `Terms`.

    The method itself is what Accelerate wraps, so that the hooks of DDP and ZeRO fire on every path through
    student and teacher.

    method: see `switchkd.training.contract.check_method`. It divides its sums by `num_items_in_batch`, which is what
        its `count` finds in the whole optimizer step over ranks and micro-batches, and its `progress` is called
        before each forward. Its `frozen` teachers are in no optimizer and no checkpoint.
    args: see `training_arguments`. Checkpoints go to `args.output_dir`.
    processing_class: the student's processor, exported beside it.
    data_collator: samples -> the batch that the method's forward takes.
    part_rates: learning rates by part; the rest trains at `args.learning_rate`, which is the one that is logged.
    parts: parameter name prefixes of each part, of which the longest wins; without it the name of a part is its prefix
        ("student.model.vision_tower").
    keep_best: the measurement ("eval_loss", "eval_" and a term's name) whose lowest value chooses the checkpoint that
        stays and that `train` ends with; None: the last step's.
    group_by_length: batches of samples of about one length (`switchkd.training.order`) instead of a plain shuffle.
    run_config: the run's configuration, flat or nested; a resume under another one is refused.
    log_file: where the records of each log go, `log.jsonl` in `args.output_dir` by default.
    log_fields: written into each record, so that runs can share a log file, such as {"stage": "pretrain"}; their values
        stand before the progress bar too.

    Raises ValueError for arguments that would train silently wrong.
    """

    def __init__(
        self,
        method: nn.Module,
        args: TrainingArguments,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: ProcessorMixin | None = None,
        *,
        data_collator: Callable[[list], dict[str, Tensor]],
        part_rates: Mapping[str, float] | None = None,
        parts: Mapping[str, Sequence[str]] | None = None,
        group_by_length: bool = False,
        keep_best: str | None = None,
        run_config: Mapping[str, Any] | None = None,
        log_file: str | os.PathLike | None = None,
        log_fields: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        check_method(method)
        check_arguments(args)
        if unused := sorted(name for name in UNUSED if options.get(name) is not None):
            raise ValueError(f"DistillTrainer does nothing with {', '.join(unused)}: leave it out")
        super().__init__(
            model=method,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **options,
        )
        self.method = method
        self.part_rates = dict(part_rates or {})
        self.parts = parts
        self.group_by_length = group_by_length
        self.keep_best = keep_best
        self.run_config = dict(run_config or {})
        self.step_log = StepLog(Path(log_file or Path(args.output_dir) / "log.jsonl"), log_fields or {})
        self.add_callback(self.step_log)
        stage = " ".join(str(value) for value in self.step_log.fields.values())
        place_reports(self.callback_handler.callbacks, self.step_log.path.parent, stage)
        if self.pop_callback(ProgressCallback):
            self.add_callback(TermsBar(stage))
        self.remove_callback(PrinterCallback)  # what it prints is in the log file
        self.add_callback(MeasureAndKeep(keep_best))
        self._stop = StopAtSignal()
        self.add_callback(self._stop)
        self._terms = TermSums()
        self._staging = False
        self._data_identity: dict[str, dict[str, Any]] | None = None

    # ---- The step

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch: forward, terms added up for the log, `backward`; otherwise Trainer's own step."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers have the two modes
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        self.method.progress(self.state.global_step / self.state.max_steps)
        with self.compute_loss_context_manager():
            terms = model(**inputs, num_items_in_batch=num_items_in_batch)
        if self._terms.empty:  # once between two logs: it waits for the device
            check_terms(terms, self.method)
            check_measured(self.keep_best, terms.named)
        self._terms.add(terms.named, self.state.global_step)
        ranks = self.accelerator.num_processes
        terms.loss = terms.loss * ranks
        terms.weighted = {name: term * ranks for name, term in terms.weighted.items()}
        self.backward(terms)
        return terms.loss.detach()

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """What `method.count` finds in the micro-batches of one optimizer step, over all ranks; at least 1."""
        count = sum(torch.as_tensor(self.method.count(batch), device=device) for batch in batch_samples)
        return self.accelerator.reduce(torch.as_tensor(count, device=device), reduction="sum").clamp(min=1).float()

    def backward(self, terms: Terms) -> None:
        """Add this micro-batch's gradient to the parameters'. Override it to coordinate the terms' gradients.

        `terms.loss` and each of `terms.weighted`, which sum to it, are divided by the items of the whole step and
        multiplied by the number of ranks, whose gradients DDP and ZeRO average: what is added up here needs no more
        scaling. `terms.named` is as the method returned it. Take apart what you like with `torch.autograd.grad`, but
        hand the result to `add_gradient`: only a backward pass reaches the hooks of DDP and ZeRO.
        """
        self._backward(terms.loss)

    def add_gradient(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """Add `gradients`, by parameter, to the parameters' own as a backward pass of this micro-batch would."""
        # The gradient of this sum is `gradients`; parameters without one get zeros, for which DDP waits.
        self._backward(
            sum(
                (parameter * gradients.get(parameter, torch.zeros_like(parameter)).detach()).sum()
                for parameter in self.method.parameters()
                if parameter.requires_grad
            )
        )

    def _backward(self, loss: Tensor) -> None:
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        # DeepSpeed would divide by the accumulation steps, which the count of items already holds.
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log with each term: summed over ranks, mean over the steps since the last log."""
        if "loss" in logs and not self._terms.empty:
            logs |= self._terms.means(self.accelerator)
            self._terms = TermSums()
        super().log(logs, start_time)
        if not math.isfinite(logs.get("loss", 0.0)):
            raise ValueError(
                f"the loss is {logs['loss']} at step {self.state.global_step} ({self.step_log.path} has the "
                "terms): start again with a lower learning rate or a smaller max_grad_norm"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer over groups by part and decay: norms and biases are not decayed."""
        model = self.model if model is None else model
        if self.optimizer is None:
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            decayed = set(self.get_decay_parameter_names(model))
            groups = parameter_groups(model, decayed, self.part_rates, self.parts, self.args)
            self.optimizer_cls_and_kwargs = (optimizer, {**options, "params": groups})
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Trainer's schedule, or steps at the milestones of `args.lr_scheduler_kwargs` (see `training_arguments`)."""
        options = self.args.lr_scheduler_kwargs or {}
        if self.lr_scheduler is None and "milestones" in options:
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = at_milestones(optimizer or self.optimizer, warmup=warmup, **options)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        if not self.group_by_length:
            return super()._get_train_sampler(train_dataset)
        arguments = self.args
        together = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
        return LengthGrouped(sample_lengths(self.train_dataset), together, arguments.seed)

    # ---- Evaluation

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """This rank's samples of `eval_dataset` (by default, or by name, of the trainer's), none of them twice."""
        if eval_dataset is None:
            eval_dataset = self.eval_dataset
        elif isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        if eval_dataset is None or len(eval_dataset) == 0:
            raise ValueError("there is no sample to evaluate on: give DistillTrainer an eval_dataset")
        return evaluation_loader(eval_dataset, self.data_collator, self.args)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """As `get_eval_dataloader`, for `predict`, which gives the same terms under other names."""
        return self.get_eval_dataloader(test_dataset)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """`eval_loss` and `eval_NAME` of each term: sums over all samples over the count of all, whatever the batch
        size and the number of ranks. It leaves torch's random state as it was, so that training goes on the same."""
        model = self._evaluated_model().eval()
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()
        self.callback_handler.eval_dataloader = dataloader

        def each() -> None:
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        device = self.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            means = mean_terms(model, dataloader, self.method.count, self._prepare_inputs, self.accelerator, each)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))

    def _evaluated_model(self) -> nn.Module:
        if self.accelerator._models:  # `train` prepared it; no gradient is wanted, so no hook of DDP either
            return self.model
        if self.is_deepspeed_enabled:
            raise ValueError("under DeepSpeed the model is evaluated while or after it trains: call train first")
        return self.accelerator.prepare_model(self.model, evaluation_mode=True)

    # ---- Checkpoints

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, **options: Any):
        """Train to the end, from the start or from a checkpoint.

        resume_from_checkpoint: a checkpoint's folder; True takes the newest whole one of `args.output_dir`,
        or starts where there is none. The weights end bit for bit as those of the uninterrupted run. Raises
        ValueError when the checkpoint is torn or another run's, and when a fresh start would mix with an
        earlier run's checkpoints; `Interrupted` when Ctrl-C or SIGTERM ended it, naming the checkpoint it left.
        """
        check_method(self.method)  # as it is now: what was frozen when it was given may not be any more
        checkpoint = chosen_checkpoint(Path(self.args.output_dir), resume_from_checkpoint, self.is_world_process_zero())
        if checkpoint:
            refuse_other_run(checkpoint, self._run())
            if not self.is_deepspeed_enabled:
                refuse_without_optimizer(checkpoint)
        if self.is_world_process_zero():
            self.step_log.start(checkpoints.step_of(checkpoint) if checkpoint else 0)
        self._terms = TermSums()
        if checkpoint and checkpoints.step_of(checkpoint) >= self.args.max_steps > 0:
            # Trainer would train one step more.
            checkpoints.load_state(self.method, checkpoint)
            self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            self._take_best()
            return TrainOutput(self.state.global_step, math.nan, {})
        try:
            with self._stop:
                output = super().train(str(checkpoint) if checkpoint else None, **options)
            self._take_best()
            return output
        except Interrupted:
            self.is_in_train = False
            self.callback_handler.on_train_end(self.args, self.state, self.control)  # bars and reports are closed
            raise

    def _take_best(self) -> None:
        if self.keep_best is not None:
            folder, first = Path(self.args.output_dir), self.is_world_process_zero()
            self.accelerator.print(take_best(self.method, self.state, self.keep_best, folder, first))

    def _run(self) -> dict[str, Any]:
        """What decides the weights, as it is kept in a checkpoint and compared on resume."""
        if self._data_identity is None:
            self._data_identity = data_identity(self.train_dataset)
        return {
            "config": self.run_config,
            "arguments": {"distribution": self._distribution(), **deciding_arguments(self.args)},
            "parts": {
                "rates": self.part_rates,
                "method": type(self.method).__name__,
                "group_by_length": self.group_by_length,
            },
            **self._data_identity,
        }

    def _distribution(self) -> str:
        if self.is_deepspeed_enabled:
            return f"ZeRO-{self.accelerator.state.deepspeed_plugin.zero_stage}"
        return "DDP" if self.args.world_size > 1 else "one process"

    def _init_training_state(self, max_steps: int, *given: Any) -> tuple[int, int]:
        trained = super()._init_training_state(max_steps, *given)
        # A resumed state has the saved distances between logs and checkpoints: these may change, as on a full disk.
        self.state.compute_steps(self.args, max_steps)
        return trained

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Export the student; inside a checkpoint (Trainer's internal call) write the method's state."""
        if _internal_call:
            checkpoints.save_state(self.method, Path(output_dir), self.state.global_step, keep=self.args.should_save)
        else:
            self.export_student(output_dir or Path(self.args.output_dir) / "student")

    def export_student(self, folder: str | os.PathLike) -> None:
        """Write the student and its processor as a stock checkpoint; all ranks call this. Replaces `folder`.

        Under ZeRO-3 call `transformers.integrations.unset_hf_deepspeed_config()` before one rank alone loads
        it again: `from_pretrained` would shard it and wait for the others. Raises ValueError when a weight is not
        finite, OSError when it cannot be written; `folder` is then as it was before.
        """
        write = self.args.should_save
        export_student(self.method, self.processing_class, Path(folder), self.state.global_step, write)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        folder = Path(super()._get_output_dir(trial))
        return str(folder / checkpoints.STAGING if self._staging else folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's checkpoint, written into a staging folder, sealed with its file list, then renamed."""
        folder, step = Path(self.args.output_dir), self.state.global_step
        staging = folder / checkpoints.STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # what a kill left
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                staged = staging / f"checkpoint-{step}"
                checkpoints.write_json(staged / checkpoints.RUN, self._run())
                checkpoints.write_json(staged / "training_args.json", self.args.to_dict())
                checkpoints.seal(staged, step)
                checkpoints.put_in_place(staged, folder / staged.name)
                staging.rmdir()
                best = self.keep_best and best_step(self.state.log_history, self.keep_best)
                checkpoints.rotate(folder, self.args.save_total_limit, best)
        except (OSError, RuntimeError, SafetensorError) as error:
            kept = checkpoints.latest_checkpoint(folder)
            failure = checkpoints.disk_error(error, f"checkpoint-{step}", folder, kept)
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            raise failure from error
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoints.load_state(self.method, Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        zero.save_engine(self.model_wrapped, self.method, output_dir)
        if self.args.should_save and not zero.owns(self.lr_scheduler):
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None):
        if not (self.is_deepspeed_enabled and resume_from_checkpoint):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        zero.load_engine(self.model_wrapped, resume_from_checkpoint)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        self._load_scaler(resume_from_checkpoint)
        return prepared
