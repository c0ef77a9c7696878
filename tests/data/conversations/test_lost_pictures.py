"""Pictures that a record has and no `image` or `images` gives: bad samples, not text without a word."""

import json
import logging
import re

import pytest
from PIL import Image
from talks import talk

from switchkd.data import read_llava, read_messages
from switchkd.data.conversations.lost_pictures import warn_without_pictures
from switchkd.data.conversations.sample_llava import CAPTIONS, INSTRUCTIONS, write_llava_sample


def llava(root, question="What is it?", turn=None, **keys):
    """What a LLaVA file of this one record holds."""
    turns = [{"from": "human", "value": question, **(turn or {})}, {"from": "gpt", "value": "A <img> plate [IMG]."}]
    (root / "train.json").write_text(json.dumps([{"conversations": turns, **keys}]))
    return list(read_llava(root / "train.json", root))


def messages(root, question="What is it?", turn=None, **keys):
    """The same of messages."""
    said = [{"role": "user", "content": question, **(turn or {})}, {"role": "assistant", "content": "A <img> [IMG]."}]
    (root / "train.jsonl").write_text(json.dumps({"messages": said, **keys}))
    return list(read_messages(root / "train.jsonl", root))


READERS = pytest.mark.parametrize("read", [llava, messages])


@READERS
@pytest.mark.parametrize(
    "keys",
    [
        {"image_path": "plate.jpg"},
        {"imagePaths": ["plate.jpg"]},
        {"img": "plate.jpg"},
        {"Image": "plate.jpg"},
        {"image_url": {"url": "https://plates/1.jpg"}},
        {"image_id": 170},
        {"photo": "plate.jpg"},
        {"frames": ["1.jpg", "2.jpg"]},
        {"pixel_values": [[0.5]]},
        {"video": "plate.mp4"},
        {"videos": ["plate.mp4"]},
        {"audio_path": "plate.wav"},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_pictures_under_another_key_are_a_bad_sample(tmp_path, read, keys):
    (key,) = keys
    message = (
        rf"(record 0|line 1): its key '{key}' (holds \d pictures and 'images?', which alone is read, 0|is not read)"
    )
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **keys)
    with pytest.raises(ValueError, match=message):  # Ollama's messages carry their pictures
        read(tmp_path, turn=keys)


def test_the_key_of_the_other_format(tmp_path):
    for pictures in ("plate.jpg", ["plate.jpg"], ["a.jpg", "b.jpg"]):
        with pytest.raises(ValueError, match=r"record 0: its key 'images' holds \d pictures and 'image', .* read, 0"):
            llava(tmp_path, images=pictures)
    with pytest.raises(ValueError, match="line 1: its key 'image' holds 1 pictures and 'images', which alone is read"):
        messages(tmp_path, image="plate.jpg")
    with pytest.raises(ValueError, match="record 0: its key 'images' holds 2 pictures and 'image', .* is read, 1"):
        llava(tmp_path, "<image>\nSame?", image="a.jpg", images=["a.jpg", "b.jpg"])
    item = {"type": "text", "text": "What is it?", "image": "plate.jpg"}
    with pytest.raises(ValueError, match="line 1: its key 'image' holds 1 pictures"):
        messages(tmp_path, [item])


@READERS
@pytest.mark.parametrize(
    "keys",
    [
        {"image_path": ""},
        {"image_path": None, "video": None, "audios": [], "frames": [""]},
        {"image_id": -1},
        {"image_size": [640, 480], "img_width": 640, "image_caption": "A plate.", "video_caption": "A plate."},
        {"source": "sharegpt", "model": "", "imagination": "much", "data_source": "images"},
    ],
    ids=["empty", "nothing", "no id", "about pictures", "others"],
)
def test_other_keys_are_no_pictures(tmp_path, read, keys):
    assert len(read(tmp_path, **keys)) == 1


def test_keys_that_name_the_same_picture_again(tmp_path):
    keys = {"image_path": "/far/plate.jpg", "images": ["plate.jpg"], "image_id": 7}
    assert len(llava(tmp_path, "<image>\nWhat is it?", image="plate.jpg", **keys)) == 1


@READERS
@pytest.mark.parametrize(
    ("question", "mark"),
    [
        ("<img>\nWhat is it?", "<img>"),
        ("What is it? <IMG>", "<IMG>"),
        ("<img>plate.jpg</img>What is it?", "<img>"),
        ("Look at <|image_pad|> and tell.", "<|image_pad|>"),
        ("<|vision_start|><|image_1|>\nWhat is it?", "<|vision_start|>"),
        ("Compare <image_0> with <image_1>.", "<image_0>"),
        ("<Image>\nWhat is it?", "<Image>"),
        ("<image/>What is it?", "<image/>"),
        ("Say [IMG] what it is.", "[IMG]"),
        ("[image] What is it?", "[image]"),
        ("<ImageHere>What is it?", "<ImageHere>"),
        ("<start_of_image> What is it?", "<start_of_image>"),
        ("<video>\nWhat happens?", "<video>"),
        ("What is said? <audio>", "<audio>"),
        ("<|audio_bos|>What is said?", "<|audio_bos|>"),
    ],
)
def test_marks_of_other_models_are_a_bad_sample(tmp_path, read, question, mark):
    with pytest.raises(
        ValueError, match=rf"(record 0|line 1): its user message holds {re.escape(repr(mark))}, which no"
    ):
        read(tmp_path, question)


@READERS
@pytest.mark.parametrize(
    "question",
    [
        "When do I write <img> and when <picture> in HTML?",
        'Correct this: <img src="a.png"> <image-viewer>',
        "<video>\n  <source src='a.mp4'>\n</video>\nWhy does it not play?",
        "<img src='a.png'>\nWhy is it not shown?",
        "A list[image] of two, x[img] and the rest.",
        "if a <image_count and b> 3: what then?",
        "What does imread return? [0] or <b>1</b>?",
        "![a plate](plate.jpg) is Markdown.",
    ],
)
def test_texts_about_marks_stay_text(tmp_path, read, question):
    assert read(tmp_path, question)[0].images == []


def test_the_sample_of_llavas_files_stays_good(tmp_path):
    write_llava_sample(tmp_path)
    assert len(list(read_llava(tmp_path / CAPTIONS, tmp_path / "images"))) == 12
    assert len(list(read_llava(tmp_path / INSTRUCTIONS, tmp_path))) == 12


def test_a_bad_record_among_good_ones_is_counted(tmp_path, caplog):
    Image.new("RGB", (4, 4)).save(tmp_path / "plate.jpg")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A plate."}]
    lost = [{**turns[0], "value": "What is it?"}, turns[1]]
    good, bad = {"conversations": turns, "image": "plate.jpg"}, {"conversations": lost, "images": ["plate.jpg"]}
    (tmp_path / "train.json").write_text(json.dumps([good, bad, good]))
    assert len(list(read_llava(tmp_path / "train.json", tmp_path, max_bad_rate=0.4))) == 2
    assert "skipped 1 bad samples of 3: 0 missing files, 1 other faults" in caplog.text


def test_a_stage_without_any_picture_is_said(caplog):
    caplog.set_level(logging.WARNING)
    warn_without_pictures([talk("Q", "A", images=0), talk("Q", "A")], "distil")
    warn_without_pictures([], "distil")
    assert not caplog.text
    warn_without_pictures([talk("Q", "A", images=0)] * 1200, "distil")
    assert "distil: none of its 1,200 samples has a picture, so that the vision tower learns nothing" in caplog.text
