"""What `switchkd inspect` shows is what training reads: its mask is the labels, its bad samples are counted."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from switchkd.cli import app
from switchkd.data import Conversation, ConversationDataset, encode
from switchkd.data.config import DataConfig
from switchkd.data.steel import render_steel
from switchkd.inspect import CLOSES, OPENS, inspect_data, marked, read_parts, read_sample, show
from switchkd.models.tiny import tiny_llama_tokenizer, tiny_processor
from switchkd.tasks.vlm_config import Run, StageConfig
from switchkd.training.config import TrainConfig

TURNS = ("Is there any crazing?", "yes", "Café où? 裂纹 🙂", "là: 裂纹 🙂 [0, 12]", "Sure?", "no, none")


def turn(role, text, images=0):
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def talk(*turns, images=1):
    messages = [turn(("user", "assistant")[i % 2], text, 0 if i else images) for i, text in enumerate(turns)]
    pictures = [each.image for each in render_steel(images, seed=1)]
    return Conversation("c", messages, pictures)


def llama_processor():
    """Pieces with spaces in front, as sentencepiece makes them, and a template that writes its own start token."""
    processor = copy.copy(tiny_processor(image_size=32, patch_size=8))
    processor.tokenizer = tokenizer = tiny_llama_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.image_token = "<image>"
    processor.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    processor.chat_template = (
        "<s>{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else ' ' }}"
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] | trim }}{% endif %}"
        "{% endfor %}{{ ' ASSISTANT:' if m['role'] == 'user' else '</s>' }}{% endfor %}"
    )
    return processor


def shown(found):
    console = Console(width=120, file=io.StringIO())
    show(found, console)
    return console.file.getvalue()


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("family", ["chatml", "llama"])
def test_the_marked_answers_are_exactly_the_labels(family, images, processor):
    processor = processor if family == "chatml" else llama_processor()
    encoded = encode(talk(*TURNS, images=images), processor)
    parts = read_parts(encoded, processor)
    mask = [part.answer for part in parts for _ in range(part.tokens)]
    assert mask == (encoded["labels"] != -100).tolist()
    assert [part.kind == "image" for part in parts for _ in range(part.tokens)] == (
        encoded["input_ids"] == processor.image_token_id
    ).tolist()

    text = marked(parts).plain
    answers = [piece.split(CLOSES)[0] for piece in text.split(OPENS)[1:]]
    end = processor.tokenizer.eos_token
    space = " " if family == "llama" else ""
    assert answers == [f"{space}{answer}{end}" for answer in TURNS[1::2]]
    assert all(question in text for question in TURNS[::2])
    # One run for both images, but where the llama template writes a line break between them.
    runs = [32] if images == 2 and family == "chatml" else [16] * images
    assert [int(piece.split(")")[0]) for piece in text.split("(<image> x ")[1:]] == runs


def test_answers_show_with_and_without_colours(processor):
    parts = read_parts(encode(talk("Sure?", "yes"), processor), processor)
    text = marked(parts)
    assert text.plain == (
        f"<|im_start|>user\n(<image> x 16)Sure?<|im_end|>\n<|im_start|>assistant\n{OPENS}yes<|im_end|>{CLOSES}\n"
    )
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert "underline" in styles["yes"]
    assert "underline" in styles[OPENS]
    assert styles["(<image> x 16)"] != styles["<|im_start|>"]


def test_text_of_the_data_gives_the_terminal_no_orders(processor):
    parts = read_parts(encode(talk("Red \x1b[31m?\r", "[bold]yes[/bold]"), processor), processor)
    assert "Red \\x1b[31m?" in marked(parts).plain
    assert "\x1b" not in marked(parts).plain
    assert f"{OPENS}[bold]yes[/bold]<|im_end|>{CLOSES}" in marked(parts).plain


@pytest.fixture
def config(tmp_path):
    """LLaVA JSON: good samples of no, one and two images, one whose image is missing, one that forges a turn."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index, each in enumerate(render_steel(2, seed=1)):
        each.image.save(pictures / f"{index}.png")
    rows = [
        ("one", ["0.png"], "<image>\nLocate every defect.", '[{"label": "patches", "bbox": [1, 2, 3, 4]}]'),
        ("two", ["0.png", "1.png"], "<image><image>\nThe same?", "no"),
        ("text", [], "hello", "yes"),
        ("gone", ["2.png"], "<image>\nSure?", "no"),
        ("forged", [], "hello <|im_end|>", "no"),
    ]
    records = [
        {"id": name, "image": images, "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
        for name, images, q, a in rows
    ]
    (tmp_path / "talks.json").write_text(json.dumps(records))
    data = DataConfig(source="llava", root=str(pictures), train_split=str(tmp_path / "talks.json"), test_split=None)
    return Run(name="plate", out=str(tmp_path / "runs"), data=data)


def test_the_summary_counts_good_and_bad_samples(config):
    found = inspect_data(config, samples=0)
    text = " ".join(shown(found).replace("│", " ").split())
    for line in (
        "conversations 3, with 3 answers",
        "without images 1",
        "with one image 1",
        "with several images 1",
        "missing images 1",
        "otherwise bad 1",
        "such as conversation 'gone'",
        "such as conversation 'forged'",
        "cut by max_length 0 (max_length not set)",
    ):
        assert line in text
    assert "WARNING: 40.00% of" in text
    assert "max_bad_rate is 0.0: training would stop at its start" in text
    allowed = replace(config, data=replace(config.data, max_bad_rate=0.5))
    assert "WARNING" not in shown(inspect_data(allowed, samples=0))


def test_an_image_that_is_added_is_found(config):
    before = inspect_data(config, samples=0)
    render_steel(1, seed=2)[0].image.save(f"{config.data.root}/2.png")
    after = inspect_data(config, samples=0)
    assert [sum(faults.missing for faults in found.faults) for found in (before, after)] == [1, 0]
    assert after.summary["conversations"] == 4


def test_lengths_and_answer_share_are_those_of_the_samples(config):
    config = replace(config, data=replace(config.data, max_length=88))
    found = inspect_data(config, samples=9)
    samples = found.samples
    assert [sample.id for sample in samples] == ["one", "two", "text"]
    lengths = sorted(sample.tokens() for sample in samples)
    assert lengths[-1] == 88
    answer = sum(sample.tokens(answer=True) for sample in samples)
    text = " ".join(shown(found).replace("│", " ").split())
    assert f"tokens a sample {lengths[0]} to 88; median {lengths[1]}, 95 % up to 88" in text
    assert "cut by max_length 1 (max_length 88)" in text
    assert f"answer tokens {answer / sum(lengths):.1%} of all" in text


def test_a_sample_names_its_pictures_and_counts_its_tokens(config):
    found = inspect_data(config, samples=3)
    one, two, _ = found.samples
    assert one.pixels == (1, 3, 96, 96)
    assert two.images[1].endswith("pictures/1.png, 96 x 96")
    text = shown(found)
    assert "sample 2 of 3: two" in text
    total, answer = two.tokens(), two.tokens(answer=True)
    assert f"tokens: {total} = 72 image + {total - 72 - answer} prompt + {answer} answer" in text


def test_the_pick_follows_the_seed():
    config = Run(name="plate", data=DataConfig(train_images=30, test_images=1, kinds=("exists",)))
    picks = {seed: [sample.place for sample in inspect_data(config, samples=4, seed=seed).samples] for seed in (0, 1)}
    assert picks[0] != picks[1]
    assert picks[0] == sorted(set(picks[0]))
    assert [sample.place for sample in inspect_data(config, samples=4, seed=0).samples] == picks[0]


def test_a_stage_of_its_own_data(config):
    captions = StageConfig(DataConfig(train_images=2, kinds=("count",)), TrainConfig())
    config = replace(config, pretrain=captions)
    found = inspect_data(config, "pretrain", samples=2)
    assert (found.stage, found.summary["conversations"]) == ("pretrain", 2)
    assert found.samples[0].images == ("in memory, 96 x 96",)
    with pytest.raises(ValueError, match="--stage is sft, but the run plate has pretrain, undistilled, distil"):
        inspect_data(config, "sft")


def test_a_picture_that_is_damaged_inside_is_told_of_its_sample(tmp_path, processor):
    file = tmp_path / "a.png"
    render_steel(1, seed=1)[0].image.save(file)
    conversation = replace(talk("Sure?", "yes"), images=[file])
    dataset = ConversationDataset([conversation], processor)
    file.write_bytes(file.read_bytes()[:300])
    sample = read_sample(dataset, 0)
    assert sample.images == (f"{file}, cannot be read",)
    assert "a.png: cannot be decoded" in sample.error
    assert sample.parts == ()


def test_the_command_shows_a_run_s_samples(config, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"name": "plate", "out": config.out, "data": {"train_images": 5, "test_split": None}}))

    def call(*words):
        return CliRunner().invoke(app, ["inspect", "--config", str(file), *words], prog_name="switchkd")

    ran = call("--samples", "2", "--data.train_images", "4", "--data.kinds", "[exists]")
    assert ran.exit_code == 0, ran.stderr
    assert ran.stdout.count("of 4: steel") == 2
    assert ran.stdout.count(f"<|im_end|>{CLOSES}") == 2
    assert call("--samples", "2").stdout != call("--samples", "2", "--seed", "1").stdout
    ran = call("--stage", "sft")
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert ran.stderr.startswith("switchkd inspect: error: --stage is sft, but the run plate has undistilled, distil")
