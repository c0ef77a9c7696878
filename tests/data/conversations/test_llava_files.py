"""LLaVA's two training files as they are, on a small copy of their layouts."""

import json
import shutil

import pytest
from PIL import Image

from switchkd.data import ConversationDataset, encode, read_llava
from switchkd.data.conversations.records import split_marks
from switchkd.data.conversations.sample_llava import CAPTIONS, INSTRUCTIONS, PICTURE_FOLDERS, write_llava_sample
from switchkd.data.conversations.summary import summarise

ROOTS = {CAPTIONS: lambda folder: folder / "images", INSTRUCTIONS: lambda folder: folder}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    write_llava_sample(folder)
    return folder


def shown(message):
    return [item.get("text", "IMAGE") for item in message["content"]]


@pytest.mark.parametrize("name", [CAPTIONS, INSTRUCTIONS])
def test_every_record_is_a_good_sample(sample, processor, name):
    dataset = ConversationDataset(read_llava(sample / name, ROOTS[name](sample)), processor, max_bad_rate=0)
    assert len(dataset) == 12
    for index, length in enumerate(dataset.lengths):
        labels = dataset[index]["labels"]
        assert len(labels) == length
        assert int((labels != -100).sum()) == dataset.answer_lengths[index]


def test_one_mark_shows_its_image_first_wherever_it_stands(sample):
    records = json.loads((sample / CAPTIONS).read_text())
    ends = [record["conversations"][0]["value"].endswith("\n<image>") for record in records]
    assert set(ends) == {True, False}
    for conversation in read_llava(sample / CAPTIONS, sample / "images"):
        assert [item["type"] for item in conversation.messages[0]["content"]] == ["image", "text"]
        assert conversation.images[0].is_file()
    first = split_marks("What is <image> showing?\n", one_first=True)
    assert first == [{"type": "image"}, {"type": "text", "text": "What is  showing?"}]
    assert [item["type"] for item in split_marks("What is <image> showing?")] == ["text", "image", "text"]


def test_several_marks_keep_their_places(sample):
    pair = next(each for each in read_llava(sample / INSTRUCTIONS, sample) if len(each.images) == 2)
    assert shown(pair.messages[0]) == ["Compare ", "IMAGE", " with ", "IMAGE", ": do their colours agree?"]
    assert pair.images[0] != pair.images[1]


def test_answers_before_the_first_question_are_left_out(sample):
    records = {str(each["id"]): each["conversations"] for each in json.loads((sample / INSTRUCTIONS).read_text())}
    texts = [each for each in read_llava(sample / INSTRUCTIONS, sample) if not each.images]
    assert len(texts) == 2
    for conversation in texts:
        turns = records[conversation.id]
        assert turns[0]["from"] == "gpt"
        assert [shown(message) for message in conversation.messages] == [[turn["value"]] for turn in turns[1:]]
        assert conversation.messages[0]["role"] == "user"


def test_a_record_of_answers_alone_is_bad(tmp_path, processor):
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": [{"from": "gpt", "value": "Hello"}]}]))
    with pytest.raises(ValueError, match=r"conversation 'a-0': has no assistant message"):
        ConversationDataset(read_llava(tmp_path / "a.json", tmp_path), processor, max_bad_rate=0)


def test_ids_may_come_twice_and_be_numbers(sample):
    ids = [each.id for each in read_llava(sample / INSTRUCTIONS, sample)]
    assert len(ids) == 12
    assert len(set(ids)) == 11
    assert "100074" in ids


def test_pictures_of_all_folders_are_there_and_follow_the_seed(sample, tmp_path):
    folders = {str(path.parent.relative_to(sample)) for path in sample.rglob("*.jpg")}
    assert folders >= set(PICTURE_FOLDERS)
    assert any(folder.startswith("images/00453") for folder in folders)
    for seed, same in ((0, True), (1, False)):
        write_llava_sample(tmp_path / str(seed), seed)
        pairs = [(path, tmp_path / str(seed) / path.relative_to(sample)) for path in sample.rglob("*.jpg")]
        assert all(one.read_bytes() == two.read_bytes() for one, two in pairs) == same


def test_missing_images_are_counted_apart_for_each_file(sample, tmp_path, processor, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(sample, copy)
    for number, path in enumerate(sorted(copy.rglob("ocr_vqa/images/*.jpg"))):
        path.unlink() if number else path.write_text("no picture")
    conversations = [each for name in (CAPTIONS, INSTRUCTIONS) for each in read_llava(copy / name, ROOTS[name](copy))]
    dataset = ConversationDataset(conversations, processor, max_bad_rate=0.2)
    assert len(dataset) == 22
    counts = f"{INSTRUCTIONS}: skipped 2 bad samples of 12: 1 missing files, 1 other faults. First reasons: "
    assert counts in caplog.text
    assert f"{CAPTIONS}: skipped" not in caplog.text
    with pytest.raises(ValueError, match=rf"{INSTRUCTIONS}: 2 of 12 .*allows: 1 missing files, 1 other faults"):
        ConversationDataset(conversations, processor, max_bad_rate=0.1)  # 2 of 24 over both files


def test_a_missing_image_names_the_one_of_another_suffix(sample, tmp_path, processor):
    path = tmp_path / "a.json"
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A cover."}]
    path.write_text(json.dumps([{"id": 1, "image": "782118577.jpg", "conversations": turns}]))
    Image.new("RGB", (8, 8)).save(tmp_path / "782118577.gif")
    (conversation,) = read_llava(path, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"782118577\.jpg: no such image file; rename 782118577\.gif, which"):
        encode(conversation, processor)
    (tmp_path / "782118577.gif").rename(tmp_path / "782118577.jpg")  # a GIF by content, as OCR-VQA's copies hold them
    assert encode(conversation, processor)["pixel_values"].shape == (1, 3, 32, 32)
    assert len(ConversationDataset([conversation], processor)) == 1


def test_the_summary_counts_what_the_set_holds(sample, processor):
    read = list(read_llava(sample / INSTRUCTIONS, sample))
    whole = ConversationDataset(read, processor)
    summary = summarise(whole)
    counts = {
        key: summary[key] for key in ("conversations", "text_only", "one_image", "several_images", "turns", "cut")
    }
    turns = sum(len(each.messages) for each in read) // 2
    assert counts == {
        "conversations": 12, "text_only": 2, "one_image": 9, "several_images": 1, "turns": turns, "cut": 0,
    }  # fmt: skip
    lengths = sorted(whole.lengths)
    assert (summary["length"]["min"], summary["length"]["max"]) == (lengths[0], lengths[-1])
    assert lengths[0] < summary["length"]["median"] <= summary["length"]["p95"] <= lengths[-1]
    answers = [encode(each, processor)["labels"] != -100 for each in read]
    assert summary["answer_share"] == pytest.approx(sum(map(int, map(sum, answers))) / sum(lengths))

    shorter = ConversationDataset(read, processor, lengths[-1] - 1)
    assert summarise(shorter)["cut"] == lengths.count(lengths[-1])
    assert max(shorter.lengths) == lengths[-1] - 1
    empty = summarise(ConversationDataset([], processor))
    assert (empty["conversations"], empty["length"]["max"], empty["answer_share"]) == (0, 0, 0)
