"""What a configuration's data section makes: both parts, picked by seed, refused where they cannot be used."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from voc_folder import write_voc

from switchkd.data.config import DataConfig, MixtureConfig
from switchkd.data.conversations.instruct import shown
from switchkd.data.sources import load_conversations
from switchkd.data.steel import CLASSES

STEEL = DataConfig(train_images=12, test_images=12)


def picture_bytes(conversations):
    return {np.asarray(image).tobytes() for conversation in conversations for image in conversation.images}


def texts(conversations):
    return [(each.id, json.dumps(each.messages)) for each in conversations]


# ---- Rendered steel


def test_steel_parts_share_no_picture():
    parts = [part for seed in (0, 1) for part in vars(load_conversations(replace(STEEL, image_seed=seed))).values()]
    seen = [picture_bytes(part) for part in parts]
    assert [len(pictures) for pictures in seen] == [12] * 4
    assert len(set.union(*seen)) == 48


def test_the_same_seed_is_the_same_data():
    first, again = load_conversations(STEEL), load_conversations(STEEL)
    other = load_conversations(replace(STEEL, image_seed=1))
    assert texts(first.train) == texts(again.train) != texts(other.train)
    assert texts(first.test) == texts(again.test) != texts(other.test)
    assert picture_bytes(first.train) == picture_bytes(again.train)


def test_training_joins_the_turns_in_shuffled_order_and_judging_asks_one_by_one():
    source = load_conversations(replace(STEEL, train_images=40))
    assert {len(each.messages) for each in source.train} == {8}
    assert {len(each.messages) for each in source.test} == {2}
    assert Counter(each.kind for each in source.test) == dict.fromkeys(("exists", "classify", "count", "locate"), 12)
    # A located answer is JSON: where it stands among the four turns.
    places = Counter(
        place
        for each in source.train
        for place, answer in enumerate(each.messages[1::2])
        if answer["content"][0]["text"].startswith("[")
    )
    assert set(places) == {0, 1, 2, 3}
    assert sum(places.values()) == 40


@pytest.mark.parametrize("field", ["train_images", "test_images"])
def test_steel_has_no_natural_end(field):
    with pytest.raises(ValueError, match=r"data\.source is steel: give data\.train_images and data\.test_images"):
        load_conversations(replace(STEEL, **{field: None}))


@pytest.mark.parametrize("field", ["train_images", "test_images"])
@pytest.mark.parametrize("count", [0, -1])
def test_a_part_without_images_is_refused(field, count):
    with pytest.raises(ValueError, match=rf"data\.{field} is {count}, it must be 1 or more; left out, all there are"):
        DataConfig(**{field: count})


# ---- A folder of Pascal VOC boxes


def image_names(conversations):
    return [image.stem for conversation in conversations for image in conversation.images]


def test_voc_parts_are_its_splits(tmp_path):
    config = write_voc(tmp_path, train=["crack", "oil_spot"] * 2, test=["crack"])
    source = load_conversations(config)
    assert image_names(source.train) == ["crack_1", "crack_2", "oil_spot_1", "oil_spot_2"]
    assert image_names(source.test) == ["crack_3"] * 4
    assert {each.kind: each.answer for each in source.test}["classify"] == "crack"
    assert {each.kind: each.answer for each in source.test}["locate"] in (
        '[{"label": "crack", "bbox": [50, 200, 450, 800]}]',
        "[]",
    )


def test_fewer_images_are_picked_by_seed_over_the_whole_part(tmp_path):
    config = write_voc(tmp_path, train=["a"] * 20 + ["b"] * 20, test=["a", "b"] * 3)
    few = replace(config, train_images=10, test_images=4)
    picked = image_names(load_conversations(few).train)
    assert len(picked) == 10
    assert {name[0] for name in picked} == {"a", "b"}  # not the first ten, which are all of one class
    assert picked == image_names(load_conversations(few).train)
    assert picked != image_names(load_conversations(replace(few, image_seed=1)).train)
    assert len(image_names(load_conversations(few).test)) == 4 * 4
    assert len(load_conversations(replace(config, train_images=99)).train) == 40


def test_classes_are_those_of_the_whole_training_part(tmp_path):
    config = write_voc(tmp_path, train=["a"] * 30 + ["rare"], test=["rare"])
    few = load_conversations(replace(config, train_images=2))
    assert "rare_1" not in image_names(few.train)
    assert {each.kind: each.answer for each in few.test}["classify"] == "rare"


def test_a_class_of_the_test_part_alone_is_refused(tmp_path):
    config = write_voc(tmp_path, train=["a", "b"], test=["a", "new"])
    with pytest.raises(
        ValueError,
        match=r"data\.test_split test: new_1 has class 'new', which no image of data\.train_split train has; its "
        "classes are a, b: correct the label, or choose splits of the same classes",
    ):
        load_conversations(config)


def test_a_training_part_without_boxes_is_refused(tmp_path):
    config = write_voc(tmp_path, train=["a"], test=["b"])
    (tmp_path / "annotations/a_1.xml").write_text(
        "<annotation><size><width>20</width><height>10</height></size></annotation>"
    )
    with pytest.raises(ValueError, match=r"data\.train_split train: no image has a box"):
        load_conversations(config)


def test_voc_folder_by_variable_or_missing(tmp_path, monkeypatch):
    config = write_voc(tmp_path, train=["a"], test=["a"])
    monkeypatch.setenv("PLATES", str(tmp_path))
    assert len(load_conversations(replace(config, root="$PLATES")).train) == 1
    monkeypatch.delenv("PLATES")
    with pytest.raises(ValueError, match=r"data\.root is \$PLATES and that variable is not set"):
        load_conversations(replace(config, root="$PLATES"))
    with pytest.raises(FileNotFoundError, match="nowhere, which is not a folder: give --data.root"):
        load_conversations(replace(config, root=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="unknown split 'val'; known splits are test, train"):
        load_conversations(replace(config, test_split="val"))


def test_bad_images_are_left_out_up_to_the_share(tmp_path, caplog):
    config = write_voc(tmp_path, train=["a"] * 4, test=["a"] * 4)
    for stem in ("a_2", "a_6"):
        (tmp_path / f"images/{stem}.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"a_2\.jpg: cannot be read as an image"):
        load_conversations(config)
    source = load_conversations(replace(config, max_bad_rate=0.25))
    assert image_names(source.train) == ["a_1", "a_3", "a_4"]
    assert set(image_names(source.test)) == {"a_5", "a_7", "a_8"}
    assert caplog.text.count("skipped 1 bad samples of 4") == 2


def test_boxes_that_count_from_0(tmp_path):
    config = write_voc(tmp_path, train=["a"], test=["a"])
    xml = tmp_path / "annotations/a_2.xml"
    xml.write_text(xml.read_text().replace("<xmin>2<", "<xmin>0<"))
    with pytest.raises(ValueError, match=r"a_2\.xml: box xmin 0, .*give first_pixel=0"):
        load_conversations(config)
    source = load_conversations(replace(config, first_pixel=0))
    located = next(each for each in source.test if each.kind == "locate")
    assert located.answer == '[{"label": "a", "bbox": [0, 300, 450, 800]}]'


# ---- Files of conversations


def llava_record(number, answer="yes"):
    turns = [{"from": "human", "value": f"<image>\nIs plate {number} whole?"}, {"from": "gpt", "value": answer}]
    return {"id": str(number), "image": "plate.jpg", "conversations": turns if answer else turns[:1]}


def messages_record(number, answer="yes"):
    record = llava_record(number, answer)
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
    return {"id": record["id"], "messages": messages, "images": [record["image"]]}


def write_file(tmp_path, source, **parts):
    """The configuration of files with the records of `parts`: train_split=[...], test_split=[...]."""
    Image.effect_noise((20, 10), 50).convert("RGB").save(tmp_path / "plate.jpg")
    for field, records in parts.items():
        text = json.dumps(records) if source == "llava" else "\n".join(map(json.dumps, records))
        (tmp_path / field).write_text(text)
    paths = {field: str(tmp_path / field) for field in ("train_split", "test_split")}
    return DataConfig(source=source, root=str(tmp_path), **paths)


FORMS = pytest.mark.parametrize(("source", "record"), [("llava", llava_record), ("messages", messages_record)])


@FORMS
def test_conversations_from_files(tmp_path, source, record):
    parts = {"train_split": list(map(record, range(30))), "test_split": list(map(record, range(30, 36)))}
    config = write_file(tmp_path, source, **parts)
    whole = load_conversations(config)
    assert [each.id for each in whole.train] == [str(number) for number in range(30)]
    assert (whole.test[0].question, whole.test[0].answer) == ("Is plate 30 whole?", "yes")
    assert whole.test[0].images == [(tmp_path / "plate.jpg").resolve()]
    few = load_conversations(replace(config, train_images=5, test_images=2))
    ids = [int(each.id) for each in few.train]
    assert ids == sorted(ids)
    assert ids != list(range(5))
    assert (len(ids), len(few.test)) == (5, 2)


@FORMS
def test_what_cannot_be_judged_is_refused_before_the_training(tmp_path, source, record):
    config = write_file(tmp_path, source, train_split=[record(0)], test_split=[record(1)])
    twice = record(2)
    key = "conversations" if source == "llava" else "messages"
    without_mark = {**twice[key][0], ("value" if source == "llava" else "content"): "And now?"}
    twice[key].append(without_mark)
    write_file(tmp_path, source, test_split=[record(1), twice])
    with pytest.raises(ValueError, match="test_split: conversation '2' does not end in a question and its answer"):
        load_conversations(config)
    write_file(tmp_path, source, test_split=[record(1)])
    (tmp_path / "plate.jpg").write_bytes((tmp_path / "plate.jpg").read_bytes()[:-40])
    with pytest.raises(ValueError, match="conversation '1'.*plate.jpg: cannot be decoded"):
        load_conversations(config)


@FORMS
def test_bad_records_are_left_out_up_to_the_share(tmp_path, caplog, source, record):
    bad = record(2)
    bad["image" if source == "llava" else "images"] = []
    lost = record(12)
    lost["image" if source == "llava" else "images"] = ["lost.jpg"]
    test = [record(10), record(11, answer=None), lost, record(13)]
    config = write_file(tmp_path, source, train_split=[record(0), record(1), bad, record(3)], test_split=test)
    with pytest.raises(ValueError, match="has 0 images but 1 <image> marks"):
        load_conversations(config)
    with pytest.raises(ValueError, match=r"test_split: 2 of 4 samples are bad .*'11' does not end .*'12': .*lost\.jpg"):
        load_conversations(replace(config, max_bad_rate=0.25))
    left = load_conversations(replace(config, max_bad_rate=0.5))
    assert [each.id for each in left.train] == ["0", "1", "3"]
    assert [each.id for each in left.test] == ["10", "13"]
    assert "train_split: skipped 1 bad samples of 4" in caplog.text
    assert "test_split: skipped 2 bad samples of 4" in caplog.text


@FORMS
def test_missing_and_empty_files(tmp_path, source, record):
    config = write_file(tmp_path, source, test_split=[record(1)])
    with pytest.raises(FileNotFoundError, match=r"data\.train_split is .*train_split, which is not a file: give the"):
        load_conversations(config)
    write_file(tmp_path, source, train_split=[])
    with pytest.raises(ValueError, match=r"data\.train_split: .*train_split holds no conversation"):
        load_conversations(config)


@FORMS
def test_files_by_variable(tmp_path, monkeypatch, source, record):
    config = write_file(tmp_path, source, train_split=[record(0)], test_split=[record(1)])
    monkeypatch.setenv("PLATES", str(tmp_path))
    named = replace(config, root="$PLATES", train_split="$PLATES/train_split", test_split="${PLATES}/test_split")
    assert load_conversations(named) == load_conversations(config)
    monkeypatch.delenv("PLATES")
    with pytest.raises(ValueError, match=r"data\.train_split is \$PLATES/train_split and that variable is not set"):
        load_conversations(replace(named, root=str(tmp_path)))


@FORMS
def test_without_a_test_split_nothing_is_judged(tmp_path, source, record):
    config = write_file(tmp_path, source, train_split=[record(0)])
    found = load_conversations(replace(config, test_split=None))
    assert ([each.id for each in found.train], found.test) == (["0"], [])


def test_steel_and_voc_without_a_test_split(tmp_path):
    steel = replace(STEEL, train_images=3)
    assert texts(load_conversations(replace(steel, test_split=None)).train) == texts(load_conversations(steel).train)
    assert load_conversations(replace(steel, test_split=None, test_images=None)).test == []
    voc = replace(write_voc(tmp_path, train=["a"]), test_split=None)
    assert [len(part) for part in vars(load_conversations(voc)).values()] == [1, 0]


# ---- Mixtures


def mixed(tmp_path, *weights, **changes):
    """A LLaVA main part of ids 0 to 3, and a messages part of ids 10 to 19 for each weight."""
    parts = {"train_split": list(map(llava_record, range(4))), "test_split": [llava_record(9)]}
    config = write_file(tmp_path, "llava", **parts)
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join(json.dumps(messages_record(number)) for number in range(10, 20)))
    mixture = tuple(MixtureConfig("messages", str(tmp_path), str(more), weight) for weight in weights)
    return replace(config, mixture=mixture, **changes)


def ids_of_parts(conversations):
    return [int(each.id) for each in conversations if int(each.id) >= 10]


@pytest.mark.parametrize(("weight", "least", "most"), [(1, 1, 1), (2, 2, 2), (0.5, 0, 1), (1.5, 1, 2), (0.01, 0, 1)])
def test_the_weight_says_how_often_a_conversation_is_seen(tmp_path, weight, least, most):
    source = load_conversations(mixed(tmp_path, weight))
    assert [each.id for each in source.train[:4]] == ["0", "1", "2", "3"]
    assert [each.id for each in source.test] == ["9"]
    seen = Counter(ids_of_parts(source.train))
    assert sum(seen.values()) == max(round(10 * weight), 1)
    assert {seen[number] for number in range(10, 20)} == {least, most}


def test_what_a_weight_picks_follows_the_seed_and_the_part(tmp_path):
    picked = ids_of_parts(load_conversations(mixed(tmp_path, 0.5, 0.5)).train)
    assert picked == ids_of_parts(load_conversations(mixed(tmp_path, 0.5, 0.5)).train)
    first, second = picked[:5], picked[5:]
    assert first == sorted(first)
    assert first != second
    assert picked != ids_of_parts(load_conversations(mixed(tmp_path, 0.5, 0.5, image_seed=1)).train)


def test_train_images_are_of_the_main_part_alone(tmp_path):
    ids = [int(each.id) for each in load_conversations(mixed(tmp_path, 1, train_images=2)).train]
    assert len(ids) == 12
    assert sum(number < 10 for number in ids) == 2


def test_a_voc_part_asks_for_its_own_classes(tmp_path):
    (tmp_path / "voc").mkdir()
    write_voc(tmp_path / "voc", all=["rust", "dent"] * 4)
    part = MixtureConfig("voc", str(tmp_path / "voc"), "all", 2)
    steel = replace(STEEL, train_images=2, test_images=1, mixture=(part,), kinds=("classify", "count"))
    source = load_conversations(steel)
    added = source.train[2:]
    assert Counter(each.id for each in added) == dict.fromkeys({each.id for each in added}, 2)
    assert len(added) == 16
    said = {message["content"][-1]["text"] for each in added for message in each.messages}
    assert {"rust", "dent"} <= said
    assert not any(shown(name) in text for text in said for name in CLASSES)
    assert {len(each.messages) for each in source.train} == {4}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"root": "$NOWHERE"}, ValueError, r"data\.mixture\[1\]\.root is \$NOWHERE and that variable is not set"),
        ({"root": "nowhere"}, FileNotFoundError, r"data\.mixture\[1\]\.root is nowhere, which is not a folder"),
        ({"split": "no.jsonl"}, FileNotFoundError, r"data\.mixture\[1\]\.split is no\.jsonl, which is not a file"),
        ({"source": "llava"}, ValueError, r"more\.jsonl: is not JSON .*read_messages"),
        ({"source": "voc"}, ValueError, "no known layout of labels"),
    ],
)
def test_a_part_that_cannot_be_read_is_named(tmp_path, change, error, message):
    config = mixed(tmp_path, 1, 1)
    config = replace(config, mixture=(config.mixture[0], replace(config.mixture[1], **change)))
    with pytest.raises(error, match=message):
        load_conversations(config)


def test_bad_records_of_a_part_are_counted_with_its_file(tmp_path, caplog):
    config = mixed(tmp_path, 1, max_bad_rate=0.1)
    more = tmp_path / "more.jsonl"
    more.write_text(more.read_text().replace('"content": "yes"', '"content": ""', 1))
    assert len(load_conversations(config).train) == 13
    assert "more.jsonl: skipped 1 bad samples of 10: 0 missing files, 1 other faults" in caplog.text
