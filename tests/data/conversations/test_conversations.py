import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from switchkd.data import Conversation, check_conversations, join_turns, read_llava, read_messages
from switchkd.data.images import TAIL_BYTES, check_image, load_image


def llava(*turns, **fields):
    """A LLaVA record; turns alternate between human and gpt."""
    named = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": "r", "conversations": named, **fields}


def write_json(root, *records):
    path = root / "train.json"
    path.write_text(json.dumps(list(records)))
    return path


def write_lines(root, *records):
    path = root / "train.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    return path


def talk(name, picture, *turns, kind="exists"):
    messages = []
    for i, text in enumerate(turns):
        content = [{"type": "text", "text": text}]
        content = [{"type": "image"}, *content] if i == 0 and picture is not None else content
        messages.append({"role": ("user", "assistant")[i % 2], "content": content})
    return Conversation(name, messages, [] if picture is None else [picture], kind)


def test_llava_json(picture):
    path = write_json(
        picture.parent,
        llava("<image>\nWhat is it?", "A plate.\n", "Sure?", "Yes.", image="plate.jpg"),
        {**llava("Hello", "Hi"), "id": 7},
        llava("Compare <image> and <image>.", "Same.", image=["plate.jpg", "plate.jpg"]),
    )
    one, two, three = read_llava(path, picture.parent)
    assert one.id == "r"
    assert one.images == [picture.resolve()]
    assert one.messages[0] == {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}],
    }
    assert one.messages[1] == {"role": "assistant", "content": [{"type": "text", "text": "A plate."}]}
    assert (one.question, one.answer) == ("Sure?", "Yes.")
    assert (two.id, two.images) == ("7", [])
    assert [item.get("text", item["type"]) for item in three.messages[0]["content"]] == [
        "Compare ",
        "image",
        " and ",
        "image",
        ".",
    ]
    assert len(three.images) == 2


def test_messages_lines(picture):
    listed = [{"type": "text", "text": "Look:"}, {"type": "image"}]
    path = write_lines(
        picture.parent,
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "<image>What?"},
                {"role": "assistant", "content": "A plate."},
            ],
            "images": ["plate.jpg"],
        },
        {
            "id": "b",
            "messages": [{"role": "user", "content": listed}, {"role": "assistant", "content": "Yes"}],
            "images": [str(picture)],
        },
    )
    one, two = read_messages(path, picture.parent)
    assert (one.id, two.id) == ("train-1", "b")
    assert [message["role"] for message in one.messages] == ["system", "user", "assistant"]
    assert one.messages[1]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert two.messages[0]["content"] == listed


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (llava("<image> Hi", "  ", image="plate.jpg"), "empty answer"),
        (llava("Hi", "Yes", image="plate.jpg"), "has 1 images but 0 <image> marks"),
        (llava("<image> Hi", "Yes"), "has 0 images but 1 <image> marks"),
        (llava("Hi", "Yes", image=3), "image paths must be text or a list of texts, but are int"),
        (
            {"conversations": [{"from": "tool", "value": "x"}]},
            "unknown role 'tool' .*known roles are system, hu",
        ),
        ({"conversations": [{"from": "human"}]}, 'a turn must be {"from": ..., "value": "..."}'),
        ({"messages": []}, "unknown layout: a record needs \"conversations\".*has keys 'messages'"),
        ("text", "unknown layout: .*has str"),
    ],
)
def test_bad_llava_records_name_file_and_record(picture, record, message):
    path = write_json(picture.parent, llava("Hi", "Yes"), record)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ", record 1: .*" + message):
        read_llava(path, picture.parent)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [{"role": "robot", "content": "x"}],
            "unknown role 'robot'; known roles are system, user, assistant",
        ),
        ([{"role": "user", "content": [{"type": "video"}]}], "unknown content item {'type': 'video'}"),
        ([{"role": "user", "content": ["x"]}], "unknown content item 'x'"),
        ([{"role": "user", "content": None}], "must be a list of items"),
        ([{"role": "user"}], 'a message must be {"role": ..., "content": ...}'),
        (None, 'unknown layout: a record needs "messages"'),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a <image> b"}]}],
            "0 images but 1 <image> marks",
        ),
    ],
)
def test_bad_message_lines_name_file_and_line(tmp_path, messages, message):
    path = write_lines(tmp_path, {"messages": messages})
    with pytest.raises(ValueError, match=re.escape(str(path)) + ", line 1: .*" + message):
        read_messages(path, tmp_path)


def test_files_of_the_wrong_kind(tmp_path):
    lines = write_lines(tmp_path, {"messages": []}, {"messages": []})
    with pytest.raises(ValueError, match=r"train\.jsonl: is not JSON .*read_messages"):
        read_llava(lines, tmp_path)
    (tmp_path / "one.json").write_text("{}")
    with pytest.raises(ValueError, match="LLaVA JSON is a list of records, but this file holds a dict"):
        read_llava(tmp_path / "one.json", tmp_path)
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 1: is not JSON"):
        read_messages(tmp_path / "broken.jsonl", tmp_path)


@pytest.mark.parametrize("name", ["../plate.jpg", "link.jpg", "folder/../../plate.jpg", "{root}/plate.jpg"])
def test_image_paths_stay_inside_the_root(picture, name):
    root = picture.parent / "root"
    root.mkdir()
    (root / "link.jpg").symlink_to(picture)
    path = write_json(root, llava("<image>", "Yes", image=name.format(root=picture.parent)))
    with pytest.raises(ValueError, match=r"record 0: image path .* outside its data root"):
        read_llava(path, root)


def test_bad_records_are_skipped_up_to_the_stated_rate(tmp_path, caplog):
    path = write_json(tmp_path, *[llava("Hi", "" if i in (3, 5) else "Yes") for i in range(20)])
    with pytest.raises(ValueError, match=r"2 of 20 samples are bad \(10\.0%\).*record 3.*record 5"):
        read_llava(path, tmp_path, max_bad_rate=0.09)
    assert not caplog.records
    assert len(list(read_llava(path, tmp_path, max_bad_rate=0.1))) == 18
    assert "skipped 2 bad samples of 20" in caplog.text
    assert "record 3: has an empty answer" in caplog.text


def test_a_line_that_is_not_utf8_is_one_bad_record(tmp_path):
    path = write_lines(tmp_path, *[{"messages": [{"role": "user", "content": "Hi"}]}] * 4)
    path.write_bytes(path.read_bytes() + b'{"messages": [{"role": "user", "content": "\xff"}]}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl, line 6: is not JSON .*codec can't decode"):
        read_messages(path, tmp_path)
    assert len(list(read_messages(path, tmp_path, max_bad_rate=0.2))) == 4


def test_check_conversations_opens_the_images(picture, caplog):
    good = [talk(f"g{i}", picture, "What?", "A plate.") for i in range(3)]
    missing = talk("m", picture.parent / "none.jpg", "What?", "A plate.")
    with pytest.raises(FileNotFoundError, match=r"conversation 'm': .*none\.jpg: no such image file"):
        check_conversations([*good, missing])
    assert check_conversations([*good, missing], max_bad_rate=0.25) == good
    assert "skipped 1 bad samples of 4" in caplog.text
    with pytest.raises(ValueError, match="conversation 'q': has no assistant message"):
        check_conversations([talk("q", picture, "What?")])
    with pytest.raises(ValueError, match="1 of 1 samples are bad"):
        check_conversations([missing], max_bad_rate=1.0)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp"])
def test_truncated_images_are_found(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.effect_noise((64, 48), 80).convert("RGB").save(path)
    assert check_image(path) == (64, 48)
    whole = path.read_bytes()
    for kept in (len(whole) // 2, len(whole) - TAIL_BYTES - 10):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=rf"a\{suffix}: cannot be decoded"):
            check_image(path)
        with pytest.raises(ValueError, match=r"conversation 't': .*cannot be decoded"):
            check_conversations([talk("t", path, "What?", "A plate.")])
        with pytest.raises(ValueError, match="cannot be decoded"):
            load_image(path)


def test_a_damaged_byte_inside_a_png_is_found(tmp_path):
    path = tmp_path / "a.png"
    Image.effect_noise((64, 48), 80).convert("RGB").save(path)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(whole)
    assert whole.endswith(b"IEND\xaeB`\x82")
    with pytest.raises(ValueError, match=r"a\.png: cannot be decoded .*; replace or remove it"):
        check_image(path)
    with pytest.raises(ValueError, match=r"conversation 't': .*a\.png: cannot be decoded"):
        check_conversations([talk("t", path, "What?", "A plate.")])


def test_a_picture_that_the_system_refuses_is_named(picture, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(ValueError, match=r"conversation 't': .*plate\.jpg: cannot be read as an image .*Permission"):
        check_conversations([talk("t", picture, "What?", "A plate.")])


def test_join_turns(picture):
    drawn = Image.new("RGB", (4, 4))
    a = [talk(f"a{i}", picture, f"q{i}", f"r{i}") for i in range(3)]
    b = [talk(f"b{i}", drawn, f"q{i}", f"r{i}") for i in range(2)]
    alone = talk("c", Image.new("RGB", (4, 4)), "q", "r")
    long = talk("d", picture, "q0", "r0", "q1", "r1")
    text = [talk(f"t{i}", None, "q", "r") for i in range(2)]
    joined = join_turns([*a, *b, alone, long, *text])
    assert [each.id for each in joined] == ["a0+2", "b0+1", "c", "d", "t0", "t1"]
    assert joined[0].images == [picture]
    assert [message["role"] for message in joined[0].messages] == ["user", "assistant"] * 3
    assert [item["type"] for message in joined[0].messages for item in message["content"]] == [
        "image",
        *["text"] * 6,
    ]
    assert (joined[0].kind, joined[2].kind) == ("", "exists")
    assert len(a[1].messages[0]["content"]) == 2  # the given ones are left alone
    assert check_conversations(joined) == joined


def test_reading_leaves_the_images_alone(picture):
    path = write_json(picture.parent, llava("<image>", "Yes", image="plate.jpg"))
    os.unlink(picture)
    assert len(list(read_llava(path, picture.parent))) == 1
