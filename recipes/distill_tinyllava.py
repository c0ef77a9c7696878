"""Switch-KD from data to table: teacher, undistilled student and Switch-KD student, judged on the same questions.

    accelerate launch recipes/distill_tinyllava.py                                     the quickstart, offline, on a CPU
    accelerate launch recipes/distill_tinyllava.py --config recipes/configs/neu_det.yaml --data.root DIR
    accelerate launch recipes/distill_tinyllava.py --name quickstart --resume true      go on after an interruption
    accelerate launch recipes/distill_tinyllava.py --help                               every field

Both students start from the same weights and see the same samples in the same order, for equally many steps at one
learning rate. The blind row is the Switch-KD student with every picture replaced by an even grey one.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from switchkd import SupervisedMethod, SwitchKD
from switchkd.config import RunConfig, TrainConfig, load_config, weight_fields
from switchkd.data import ConversationDataset
from switchkd.data.sources import load_source
from switchkd.evaluation import answer_rows, generate_answers, score_answers
from switchkd.evaluation.pictures import draw_located
from switchkd.evaluation.table import results_table
from switchkd.models import freeze, load_llava, same_inputs, shared_vocab
from switchkd.models.students import build_student
from switchkd.models.tiny import TEACHER
from switchkd.runs import RunFolder
from switchkd.training import DistillTrainer, part_rates, process_state, training_arguments
from switchkd.training.memory import keep_freed_memory

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


def main(argv: list[str] | None = None) -> Path:
    """Runs every stage that is not finished yet, judges, and returns the run's folder."""
    started = time.perf_counter()
    config = read_config(list(sys.argv[1:] if argv is None else argv))
    transformers_logging.disable_progress_bar()
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    state = process_state()
    run = RunFolder.resume(config) if config.resume else None

    source = load_source(config.data)
    teacher, teacher_processor = load_llava(config.teacher.path or TEACHER)
    set_seed(config.seed)
    student, processor = build_student(config.student)
    # A pair that cannot be switched ends here, before any training.
    shared = shared_vocab(processor.tokenizer, teacher_processor.tokenizer)
    same_inputs(processor, teacher_processor)
    switch_kd(config, student, teacher, shared)
    samples = ConversationDataset(source.train, processor, config.data.max_length, config.data.max_bad_rate)
    questions = ConversationDataset(source.test, processor, max_bad_rate=config.data.max_bad_rate).conversations
    state.print(f"{len(samples):,} training samples, {len(questions):,} test questions")
    if config.data.in_memory:
        order = tqdm(range(len(samples)), desc="encoding", unit="sample", disable=not state.is_local_main_process)
        samples = [samples[index] for index in order]
    run = run or start_run(config)  # what cannot run has ended above and leaves no folder
    state.print(f"run folder: {run.path}")

    teacher_path = config.teacher.path or TEACHER
    if config.teacher.steps:
        teacher_path = run.model("teacher")
        if not teacher_path.exists():
            freeze(teacher)
            settings = replace(config.train, steps=config.teacher.steps, lr=config.teacher.lr, encoder_lr=None)
            train(run, "teacher", SupervisedMethod(teacher), settings, samples, teacher_processor)
    teacher, _ = load_llava(teacher_path, torch.bfloat16 if config.train.bf16 else torch.float32)
    models = {"teacher": teacher}
    for stage in ("undistilled", "student"):
        if not run.model(stage).exists():
            set_seed(config.seed)
            student, processor = build_student(config.student)
            distils = stage == "student"
            method = switch_kd(config, student, teacher, shared) if distils else SupervisedMethod(student)
            train(run, stage, method, config.train, samples, processor)
        models[stage], processor = load_llava(run.model(stage))

    judge(run, models, processor, questions)
    state.print(f"{(time.perf_counter() - started) / 60:.1f} minutes; everything is in {run.path}")
    return run.path


def read_config(argv: list[str]) -> RunConfig:
    """The configuration; without --config that of the run to resume, or else the quickstart's."""
    if any(argument.partition("=")[0] == "--config" for argument in argv):
        return load_config(argv)
    config = load_config(["--config", str(QUICKSTART), *argv])
    own = config.folder / "config.yaml"
    return load_config(["--config", str(own), *argv]) if config.resume and own.is_file() else config


def start_run(config: RunConfig) -> RunFolder:
    """The run's folder, made by the first process and known to all."""
    folder = [RunFolder.start(config) if PartialState().is_main_process else None]
    return broadcast_object_list(folder)[0]


def switch_kd(config: RunConfig, student, teacher, shared: int) -> SwitchKD:
    return SwitchKD(student, teacher, shared_vocab=shared, **asdict(config.method))


def train(run: RunFolder, stage: str, method, settings: TrainConfig, samples, processor) -> None:
    """Trains one stage, from its newest checkpoint if it was interrupted, and exports its student."""
    PartialState().print(f"training: {stage}, {settings.steps} steps")
    trainer = DistillTrainer(
        method,
        training_arguments(settings, run.checkpoints(stage), seed=run.config.seed),
        train_dataset=samples,
        processing_class=processor,
        part_rates=part_rates(settings),
        run_config=weight_fields(run.config),
        log_file=run.path / "log.jsonl",
        log_fields={"stage": stage},
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.export_student(run.model(stage))
    if trainer.is_world_process_zero():
        shutil.rmtree(run.checkpoints(stage), ignore_errors=True)


def judge(run: RunFolder, models: dict, processor, questions: list) -> None:
    """Every model answers the same questions; writes results.json, answers.jsonl, table.md, boxes.png."""
    state = PartialState()
    rows = [("teacher", "teacher", False), ("undistilled", "undistilled", False)]
    rows += [("Switch-KD", "student", False), ("Switch-KD, blind", "student", True)]
    results, answers, lines = {}, {}, []
    for name, stage, blank in rows:
        model = models[stage].to(state.device)
        state.print(f"judging: {name}")
        with state.split_between_processes(questions) as part:
            given = generate_answers(
                model,
                processor,
                part,
                blank_image=blank,
                progress=state.is_local_main_process,
                **asdict(run.config.judge),
            )
        answers[name] = gather_object(given)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        results[name] = {"parameters": parameters, **score_answers(questions, answers[name])}
        lines += [{"model": name, **row} for row in answer_rows(questions, answers[name])]
    if not state.is_main_process:
        return
    table = results_table(results)
    run.write("results.json", results)
    run.write("answers.jsonl", lines)
    run.write_text("table.md", table)
    sheet = draw_located(questions, {name: answers[name] for name, _, blank in rows if not blank})
    if sheet is not None:
        sheet.save(run.path / "boxes.png")
    print(f"\n{table}")


if __name__ == "__main__":
    main()
