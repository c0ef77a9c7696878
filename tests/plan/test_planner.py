from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from switchkd.data.config import DataConfig
from switchkd.methods.switch_kd_config import SwitchKDConfig
from switchkd.models.config import StudentConfig, TeacherConfig
from switchkd.models.tiny import random_llava, tiny_processor, tiny_tokenizer
from switchkd.plan import make_plan, show
from switchkd.plan.gpus import GPUS, find_gpu, kept_memory
from switchkd.plan.survey import KNOWN_SETS
from switchkd.tasks.vlm_config import Run, StageConfig
from switchkd.training.config import TrainConfig

SIZES = {"vision_hidden": 32, "vision_layers": 2, "image_size": 32, "patch_size": 8, "layers": 2}
TRAIN = TrainConfig(batch_size=4, bf16=True)


def save(folder, *, processor=None, **sizes) -> str:
    random_llava(tiny_tokenizer(), **{**SIZES, **sizes}).save_pretrained(folder)
    (processor or tiny_processor(image_size=32, patch_size=8)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[str, str]:
    """Folders of a student and of a teacher that can be switched, of 16 visual tokens."""
    folder = tmp_path_factory.mktemp("pair")
    return save(folder / "student", hidden=32), save(folder / "teacher", hidden=48)


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> DataConfig:
    """Twelve conversations about one picture, of one to twelve words."""
    folder = tmp_path_factory.mktemp("talks")
    Image.new("RGB", (40, 40)).save(folder / "a.png")
    lines = [
        {
            "images": ["a.png"],
            "messages": [
                {"role": "user", "content": "<image>\nIs there a scratch?"},
                {"role": "assistant", "content": " ".join(["yes"] * words)},
            ],
        }
        for words in range(1, 13)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return DataConfig(
        source="messages", root=str(folder), train_split=str(folder / "train.jsonl"), test_split=None, max_length=64
    )


@pytest.fixture
def run(pair, talks) -> Run:
    return Run(
        name="run",
        undistilled=False,
        teacher=TeacherConfig(path=pair[1]),
        student=StudentConfig(path=pair[0]),
        data=talks,
        train=TRAIN,
    )


def problems(plan, *, stop: bool = True) -> dict[str, str]:
    return {problem.field: problem.text for problem in plan.problems if problem.stops == stop}


def shown(plan, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(plan, console)
    return console.file.getvalue()


def test_a_sound_run_has_stages_steps_and_lengths_read_from_its_data(run):
    plan = make_plan(replace(run, undistilled=True), gpus=1)
    assert problems(plan) == {}
    assert [stage.name for stage in plan.stages] == ["undistilled", "distil"]
    control, student = plan.stages
    assert (student.survey.samples, student.steps, student.accumulation) == (12, 3, 1)
    assert 16 < student.survey.tokens < student.survey.padded < student.survey.longest < 64
    assert student.survey.assumed == ""
    assert ("switch", "backward") in student.flops
    assert ("switch", "backward") not in control.flops
    assert sum(student.flops.values()) > 2 * sum(control.flops.values())
    assert sum(student.memory.values()) > sum(control.memory.values())
    assert plan.visual_tokens == 16


def test_grouping_by_length_leaves_less_padding(run):
    grouped = replace(run, train=replace(run.train, group_by_length=True))
    plain, grouped = (make_plan(each, gpus=1).stages[-1] for each in (run, grouped))
    assert plain.survey.tokens == grouped.survey.tokens
    assert grouped.survey.padded < plain.survey.padded
    assert sum(grouped.flops.values()) < sum(plain.flops.values())
    assert grouped.memory == plain.memory  # that of the longest batch, which both have


def test_hours_follow_from_arithmetic_rate_and_share(run):
    plan = make_plan(run, gpu="a100", gpus=2, efficiency=0.5)
    stage = plan.stages[-1]
    rate = 312e12 * 0.5 * 2 / sum(stage.flops.values())
    assert stage.samples_a_second == pytest.approx(rate)
    assert stage.steps == 2  # 12 samples, 4 x 2 at once
    assert stage.hours == pytest.approx(16 / rate / 3600)
    assert plan.gpu_hours == pytest.approx(2 * sum(stage.hours for stage in plan.stages))
    assert make_plan(run, gpu="h100", gpus=2, efficiency=0.5).gpu_hours == pytest.approx(plan.gpu_hours * 312 / 989)


def test_known_sets_are_recognised_and_what_is_assumed_is_said(run, monkeypatch):
    monkeypatch.delenv("LLAVA_DATA", raising=False)
    data = DataConfig(
        source="llava",
        root="$LLAVA_DATA",
        train_split="$LLAVA_DATA/blip_laion_cc_sbu_558k.json",
        test_split=None,
        max_length=2048,
    )
    pretrain = StageConfig(data, replace(TRAIN, global_batch_size=256), freeze=("vision_tower", "language_model"))
    plan = make_plan(replace(run, pretrain=pretrain), gpus=8)
    stage = plan.stages[0]
    assert (stage.name, stage.survey.samples, stage.steps, stage.accumulation) == ("pretrain", 558_128, 2181, 8)
    assert KNOWN_SETS["llava_v1_5_mix665k"].samples == 665_298
    (said,) = [text for text in plan.assumed if text.startswith("pretrain.data")]
    assert "$LLAVA_DATA has a variable that is not set: 558,128 samples, as published; assumed 45 text" in said
    trained = {part: trained for part, (trained, _) in stage.parameters.items() if trained}
    assert set(trained) == {"projector"}


def test_an_unknown_number_of_samples_leaves_times_open(run, tmp_path):
    data = DataConfig(source="llava", root=str(tmp_path), train_split=str(tmp_path / "mine.json"), test_split=None)
    plan = make_plan(replace(run, data=data), gpus=1)
    assert plan.stages[-1].steps is plan.gpu_hours is None
    assert plan.stages[-1].flops
    assert "give train.steps" in problems(plan, stop=False)["train.steps"]
    assert "?" in shown(plan)
    given = make_plan(replace(run, data=data, train=replace(TRAIN, steps=7)), gpus=1)
    assert given.stages[-1].steps == 7
    assert given.gpu_hours > 0


def test_towers_of_other_widths_and_other_visual_tokens_cannot_be_switched(run, tmp_path):
    wide = save(tmp_path / "wide", vision_hidden=48)
    text = problems(make_plan(replace(run, student=StudentConfig(path=wide)), gpus=1))["method"]
    assert "48 wide and the teacher's projector reads 32" in text
    fine = save(tmp_path / "fine", patch_size=4, processor=tiny_processor(image_size=32, patch_size=4))
    long = replace(run.data, max_length=None)
    plan = make_plan(replace(run, student=StudentConfig(path=fine), data=long, undistilled=True), gpus=1)
    assert "64 tokens, the teacher 32 px in patches of 8, 16 tokens" in problems(plan)["method"]
    assert plan.stages[-1].flops == {}
    assert plan.stages[0].flops  # the undistilled student could be trained
    assert "what would go wrong" in shown(plan).lower()


def test_an_adapter_lets_towers_of_other_widths_be_switched(run, tmp_path):
    wide = StudentConfig(path=save(tmp_path / "wide", vision_hidden=48))
    adapted = replace(run, student=wide, method=SwitchKDConfig(switch_adapter="linear"))
    plan = make_plan(adapted, gpus=1)
    assert problems(plan) == {}
    trained = sum(part[0] for part in plan.stages[0].parameters.values()) + 48 * 32 + 32
    assert plan.stages[0].memory["AdamW"] == 8 * trained


def test_one_frozen_encoder_in_both_makes_the_switch_exactly_zero(run, pair):
    run = replace(run, distil=StageConfig(freeze=("vision_tower",)))
    shared = StudentConfig(path=pair[1])
    assert "exactly zero" in problems(make_plan(replace(run, student=shared), gpus=1))["method"]
    text = problems(make_plan(run, gpus=1))["method"]
    assert "trains the student's vision tower alone, and that is frozen" in text
    without = replace(run, student=shared, method=SwitchKDConfig(switch=None))
    assert problems(make_plan(without, gpus=1)) == {}


def test_equal_encoders_that_are_trained_are_a_note(run, pair):
    plan = make_plan(replace(run, student=StudentConfig(path=pair[1])), gpus=1)
    assert problems(plan) == {}
    assert "begins at zero" in problems(plan, stop=False)["method.switch"]
    trained = StageConfig(run.data, TRAIN)
    moved = make_plan(replace(run, student=StudentConfig(path=pair[1]), sft=trained), gpus=1)
    assert "method.switch" not in problems(moved, stop=False)


def test_other_vocabularies_are_found_where_the_tokenizers_are_local(run, tmp_path):
    processor = tiny_processor(image_size=32, patch_size=8)
    processor.tokenizer.add_tokens(["scratchy"])
    other = save(tmp_path / "other", processor=processor)
    text = problems(make_plan(replace(run, student=StudentConfig(path=other)), gpus=1))["teacher.path"]
    assert "'scratchy'" in text


def test_tokenizers_that_are_not_on_this_disk_are_not_checked_and_that_is_said(run):
    student = StudentConfig(vision_tower="google/siglip-base-patch16-224", language_model="Qwen/Qwen2.5-0.5B")
    run = replace(run, student=student, data=replace(run.data, max_length=None))
    plan = make_plan(replace(run, distil=None, sft=StageConfig()), gpus=1)
    (stage,) = plan.stages
    assert plan.teacher == {}
    assert any(text.startswith("data, the student's tokenizer is not on this disk") for text in plan.assumed)
    assert sum(plan.student["language model"]) == 494_032_768
    assert plan.visual_tokens == 196
    # Downloads: 4 bytes a parameter of the tower, 2 of the language model.
    assert plan.disk["weights to download"] == 4 * sum(plan.student["vision tower"]) + 2 * 494_032_768
    distilled = make_plan(replace(run, undistilled=False), gpus=1)
    assert any("the tokenizer of Qwen/Qwen2.5-0.5B is not on this disk" in text for text in distilled.assumed)
    assert "224 px in patches of 16" in problems(distilled)["method"]
    assert stage.flops


def test_max_length_that_cuts_images_or_answers_is_found(run):
    cuts_images = replace(run, data=replace(run.data, max_length=14))
    text = problems(make_plan(cuts_images, gpus=1))
    assert "max_length=14 cuts image tokens of a sample of 35 ids" in text["data"]
    assert "14 cuts the 16 tokens of an image" in text["data.max_length"]
    cuts_answers = make_plan(replace(run, data=replace(run.data, max_length=40)), gpus=1)
    assert "40 cuts" in problems(cuts_answers)["data.max_length"]
    assert cuts_answers.stages[-1].survey.longest == 40


def test_memory_beyond_the_gpu_names_what_would_fit(run):
    large = replace(run, train=replace(TRAIN, batch_size=40_000, global_batch_size=80_000))
    plan = make_plan(large, gpu="rtx3090", gpus=2)
    text = problems(plan)["train.batch_size"]
    assert text.startswith("40000 needs ")
    assert "one RTX 3090 has 24: set train.batch_size" in text
    size = int(text.partition("set train.batch_size ")[2].partition(",")[0])
    assert 80_000 % (2 * size) == 0
    fits = make_plan(replace(run, train=replace(large.train, batch_size=size)), gpu="rtx3090", gpus=2)
    assert "train.batch_size" not in {**problems(fits), **problems(fits, stop=False)}
    assert "train.gradient_checkpointing true" in text
    assert "--engine zero2" in text


def test_a_global_batch_that_does_not_divide_is_found(run):
    plan = make_plan(replace(run, train=replace(TRAIN, global_batch_size=10)), gpus=2)
    assert "10 but 2 processes of train.batch_size 4 make 8" in problems(plan)["train.global_batch_size"]
    assert plan.stages[-1].accumulation == 2


def test_what_engines_share_is_on_each_gpu_once(run):
    run = replace(run, train=replace(TRAIN, gradient_accumulation_steps=2))
    whole, shared = (make_plan(run, gpus=4, engine=engine).stages[-1].memory for engine in ("ddp", "zero2"))
    trained = whole["gradients"] // 4
    assert whole["AdamW"] == 8 * trained
    assert shared["AdamW"] == 12 * trained // 4
    assert shared["student weights"] * 2 == whole["student weights"]
    assert shared["gradients"] == 2 * trained // 4
    stages = make_plan(replace(run, undistilled=True), gpus=4, engine="zero3")
    assert "zero3 trains one stage, this run has 2" in problems(stages)["--engine"]
    sizes = {"parameters": 100, "trained": 60, "teacher": 40, "bf16": True, "teacher_bf16": True}
    kept = kept_memory(**sizes, engine="zero3", gpus=4)
    assert (kept["student weights"], kept["teacher weights"], kept["gathered weights"]) == (50, 20, 280)


def test_training_the_teacher_first_is_a_stage_of_its_own_shape(run):
    plan = make_plan(replace(run, teacher=replace(run.teacher, steps=5)), gpus=1)
    teacher = plan.stages[0]
    assert (teacher.name, teacher.steps) == ("teacher", 5)
    assert sum(map(sum, teacher.parameters.values())) == sum(map(sum, plan.teacher.values()))


@pytest.mark.parametrize("lora", ["language_model", "vision_tower"])
def test_lora_is_trained_and_nothing_else_of_its_part(run, lora):
    plan = make_plan(replace(run, train=replace(TRAIN, lora_rank=2, lora_parts=(lora,))), gpus=1)
    for part, (trained, frozen) in plan.stages[-1].parameters.items():
        assert trained if part != lora.replace("_", " ") else 0 < trained < 0.2 * frozen
    assert plan.stages[-1].memory["AdamW"] == 8 * sum(part[0] for part in plan.stages[-1].parameters.values())


def test_checkpoints_on_the_disk_are_weights_and_moments(run):
    keeps = replace(run, undistilled=False, train=replace(TRAIN, keep_checkpoints=3))
    plan = make_plan(keeps, gpus=1)
    parameters = sum(map(sum, plan.student.values()))
    trained = sum(part[0] for part in plan.stages[-1].parameters.values())
    assert plan.disk["checkpoints"] == 4 * (4 * parameters + 8 * trained)
    assert plan.disk["students of the stages"] == 4 * parameters
    assert plan.disk["weights to download"] == 0
    assert make_plan(replace(keeps, train=replace(TRAIN, checkpoint_every=0)), gpus=1).disk["checkpoints"] == 0


def test_bad_samples_beyond_the_rate_are_found(run, tmp_path):
    bad = {"images": ["missing.png"], "messages": [{"role": "user", "content": "<image>\nA?"}]}
    good = Path(run.data.train_split).read_text()
    (tmp_path / "train.jsonl").write_text(f"{good}\n{json.dumps(bad)}")
    data = replace(run.data, train_split=str(tmp_path / "train.jsonl"))
    plan = make_plan(replace(run, data=data), gpus=1)
    assert "1 of 13 samples read are bad, more than the rate 0.0" in problems(plan)["data.max_bad_rate"]
    allowed = make_plan(replace(run, data=replace(data, max_bad_rate=0.1)), gpus=1)
    assert problems(allowed) == {}
    assert allowed.stages[-1].survey.samples == 12


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("gpu", "v100", "--gpu is v100: known are a100-40, a100, h100"),
        ("engine", "fsdp", "--engine is fsdp: known are ddp, zero2, zero3"),
        ("gpus", 0, "--gpus is 0"),
        ("efficiency", 1.5, "--efficiency 1.5"),
    ],
)
def test_unknown_arguments_are_refused(run, option, value, message):
    with pytest.raises(ValueError, match=message):
        make_plan(run, **{option: value})


def test_gpus_are_found_however_they_are_written():
    assert find_gpu("RTX 4090") is GPUS["rtx4090"]
    assert find_gpu("A100-40") is GPUS["a100-40"]


def five_stages(run) -> Run:
    earlier = StageConfig(run.data, TRAIN)
    return replace(run, undistilled=True, teacher=replace(run.teacher, steps=5), pretrain=earlier, sft=earlier)


@pytest.mark.parametrize("width", [80, 60])
def test_a_plan_of_five_stages_is_shown_whole_in_80_columns(run, width):
    plan = make_plan(five_stages(replace(run, name="[red]run")), gpus=1)
    long = replace(plan.stages[-1], steps=12_345_678, samples_a_second=123_456.7, hours=1_234_567.8)
    long = replace(long, survey=replace(long.survey, samples=1_234_567_890, padded=131_072))
    for each in (plan, replace(plan, stages=[*plan.stages[:-1], long])):
        text = shown(each, width)
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        words = text.split()
        for stage in plan.stages:  # in four tables, in each of them once or more
            assert words.count(stage.name) >= 4, stage.name
        for line in (
            "[red]run on 1 x H100 SXM, ddp",
            "16 visual tokens",
            "switch, backward",
            "AdamW",
            "Disk",
            "in all",
        ):
            assert line in text
        for head in ("samples", "batch x GPUs", "x accumulation", "steps", "hours", "GPU-", "language model, head"):
            assert head in text
    for number in ("1,234,567,890", "131,072", "12,345,678", "123,456.7", "1,234,567.8"):
        assert number in text
    assert "nothing that is checked here" in text


def test_text_of_a_plan_names_its_share_of_the_peak(run):
    assert "0.25 of the dense bfloat16 peak of 989 TFLOP/s" in shown(make_plan(run, gpus=1), 100)
