"""The check of all samples before training: kept on the disk, shared by workers, and every time reported."""

import json
import pickle
import shutil

import pytest
import torch
from talks import TURNS, talk, with_template

from switchkd.data import Conversation, ConversationDataset
from switchkd.data.conversations import sample_check
from switchkd.data.conversations.check_cache import outcome_key
from switchkd.data.conversations.sample_check import SampleCheck
from switchkd.models.tiny import tiny_processor


@pytest.fixture
def conversations(picture):
    messages = talk("Q", "A").messages
    lost = Conversation("lost", messages, [picture.parent / "lost.jpg"], source="a.json")
    good = [Conversation(f"g{i}", talk("Q", "A" * i).messages, [picture], source="a.json") for i in range(1, 18)]
    return [*good[:9], lost, *good[9:], talk("Q", " ", name="empty"), *[talk(*TURNS, name=f"t{i}") for i in range(6)]]


@pytest.fixture
def counted(monkeypatch):
    """The ids of all conversations that were checked, in order."""
    ids = []
    checks = SampleCheck.__call__

    def check(self, conversation):
        ids.append(conversation.id)
        return checks(self, conversation)

    monkeypatch.setattr(SampleCheck, "__call__", check)
    return ids


def test_a_second_start_takes_the_outcome_from_the_disk_and_reports_it_again(
    conversations, processor, tmp_path, counted, caplog
):
    first = ConversationDataset(conversations, processor, 90, 0.2, cache=tmp_path / "checks")
    assert counted == [each.id for each in conversations]
    said = caplog.messages
    assert [text.split(" First")[0] for text in said] == [
        "a.json: skipped 1 bad samples of 18: 1 missing files, 0 other faults.",
        "training conversations: skipped 1 bad samples of 7: 0 missing files, 1 other faults.",
        "max_length=90 cuts the end of 6 of 25 samples",
    ]
    caplog.clear()
    counted.clear()
    again = ConversationDataset(conversations, processor, 90, 0.2, cache=tmp_path / "checks")
    assert len(counted) == 2  # the bad ones alone: they might have become good
    assert caplog.messages == said
    for name in ("conversations", "lengths", "answer_lengths", "cut", "faults"):
        assert getattr(again, name) == getattr(first, name)
    assert len(again) == len(again.lengths) == len(again.answer_lengths) == 23


def test_a_second_start_applies_its_own_rate(conversations, processor, tmp_path, counted):
    ConversationDataset(conversations, processor, max_bad_rate=0.2, cache=tmp_path)
    counted.clear()
    for rate in (0.1, 0.0):
        with pytest.raises(ValueError, match=rf"conversations: 1 of 7 .*max_bad_rate={rate}|a\.json: 1 of 18"):
            ConversationDataset(conversations, processor, max_bad_rate=rate, cache=tmp_path)
    assert len(counted) == 2 * 2


def test_what_passes_no_rate_is_kept_as_well(conversations, processor, tmp_path, counted):
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a\.json: 1 of 18"):
            ConversationDataset(conversations, processor, max_bad_rate=0.01, cache=tmp_path)
    assert len(counted) == len(conversations) + 2


def test_an_image_that_has_come_since_is_found(conversations, processor, picture, tmp_path, counted, caplog):
    ConversationDataset(conversations, processor, max_bad_rate=0.2, cache=tmp_path)
    shutil.copy(picture, picture.parent / "lost.jpg")
    again = ConversationDataset(conversations, processor, max_bad_rate=0.2, cache=tmp_path)
    assert len(again) == 24
    assert "images have come or gone since an earlier start" in caplog.text
    counted.clear()
    assert len(ConversationDataset(conversations, processor, max_bad_rate=0.2, cache=tmp_path)) == 24
    assert len(counted) == 1


def changed_text(conversations, processor):
    return [*conversations[:-1], talk(*TURNS[:-1], "no", name="t5")], processor, 300


def changed_id(conversations, processor):
    return [*conversations[:-1], talk(*TURNS, name="other")], processor, 300


def changed_order(conversations, processor):
    return conversations[::-1], processor, 300


def changed_path(conversations, processor):
    first = conversations[0]
    other = Conversation(first.id, first.messages, [first.images[0].with_name("b.jpg")], source=first.source)
    return [other, *conversations[1:]], processor, 300


def changed_template(conversations, processor):
    return conversations, with_template(processor, processor.chat_template + "{# #}"), 300


def changed_length(conversations, processor):
    return conversations, processor, 299


@pytest.mark.parametrize(
    "change", [changed_text, changed_id, changed_order, changed_path, changed_template, changed_length]
)
def test_anything_else_is_checked_anew(conversations, processor, tmp_path, counted, change):
    ConversationDataset(conversations, processor, 300, 0.5, cache=tmp_path)
    changed, other, max_length = change(conversations, processor)
    ConversationDataset(changed, other, max_length, 0.5, cache=tmp_path)
    assert len(counted) == 2 * len(conversations)
    assert len(list(tmp_path.glob("samples-*.json"))) == 2


def test_another_tokenizer_or_picture_size_is_checked_anew(conversations, tmp_path, counted):
    processors = [tiny_processor(32, 8), tiny_processor(48, 8), tiny_processor(32, 8)]
    processors[2].tokenizer.add_tokens(["crazing"])
    for number, processor in enumerate(processors, start=1):
        ConversationDataset(conversations, processor, max_bad_rate=0.2, cache=tmp_path)
        assert len(counted) == number * len(conversations)
    used = tiny_processor(32, 8)
    clean = outcome_key(conversations, used, 16, None)
    used.tokenizer("what another caller left behind", padding="max_length", truncation=True, max_length=9)
    assert outcome_key(conversations, used, 16, None) == clean


@pytest.mark.parametrize("damage", ["half", "text", "other key", "fewer", "list"])
def test_a_torn_or_foreign_file_is_written_again(conversations, processor, tmp_path, counted, caplog, damage):
    first = ConversationDataset(conversations, processor, max_bad_rate=0.2, cache=tmp_path / "checks")
    (path,) = (tmp_path / "checks").iterdir()
    whole = path.read_text()
    kept = json.loads(whole)
    path.write_text(
        {
            "half": whole[: len(whole) // 2],
            "text": "no outcome",
            "other key": json.dumps({**kept, "key": "0" * 64}),
            "fewer": json.dumps({**kept, "lengths": kept["lengths"][:-1]}),
            "list": "[]",
        }[damage]
    )
    again = ConversationDataset(conversations, processor, max_bad_rate=0.2, cache=tmp_path / "checks")
    assert f"{path} is torn or of another kind" in caplog.text
    assert len(counted) == 2 * len(conversations)
    assert again.lengths == first.lengths
    assert list(path.parent.iterdir()) == [path]
    assert path.read_text() == whole


def test_a_folder_that_cannot_be_written_is_said_and_nothing_more(conversations, processor, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert len(ConversationDataset(conversations, processor, max_bad_rate=0.2, cache=tmp_path / "file")) == 23
    assert "the check could not be kept" in caplog.text


def test_workers_find_the_same_and_leave_the_random_state_alone(conversations, processor, monkeypatch, capsys):
    alone = ConversationDataset(conversations, processor, max_bad_rate=0.2)
    assert "checking samples" not in capsys.readouterr().err
    monkeypatch.setattr(sample_check, "LARGE", 20)
    monkeypatch.setattr(sample_check, "AT_ONCE", 4)
    state = torch.get_rng_state()
    shared = ConversationDataset(conversations, processor, max_bad_rate=0.2, workers=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert (shared.lengths, shared.faults) == (alone.lengths, alone.faults)
    assert [each.id for each in shared.conversations] == [each.id for each in alone.conversations]
    assert "checking samples: 100%" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    ConversationDataset(conversations, processor, max_bad_rate=0.2)
    assert "checking samples" not in capsys.readouterr().err


def test_without_tolerance_the_first_bad_one_is_the_error(conversations, processor, tmp_path, counted):
    with pytest.raises(FileNotFoundError, match=r"conversation 'lost': .*lost\.jpg: no such image file"):
        ConversationDataset(conversations, processor, max_bad_rate=0, cache=tmp_path)
    assert not list(tmp_path.glob("samples-*"))
    with pytest.raises(ValueError, match="max_bad_rate=2 must lie between 0 and 1"):
        ConversationDataset(conversations, processor, max_bad_rate=2)


def test_a_dataset_travels_to_data_workers(conversations, processor):
    dataset = ConversationDataset(conversations, processor, max_bad_rate=0.2)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.lengths == dataset.lengths
    assert torch.equal(copy[20]["labels"], dataset[20]["labels"])


def test_an_image_that_has_gone_since_is_found_before_training(conversations, processor, picture, tmp_path, caplog):
    ConversationDataset(conversations, processor, max_bad_rate=0.2, cache=tmp_path)
    other = picture.parent / "other.jpg"
    shutil.copy(picture, other)
    more = [*conversations, Conversation("more", conversations[0].messages, [other], source="a.json")]
    assert len(ConversationDataset(more, processor, max_bad_rate=0.2, cache=tmp_path)) == 24
    other.unlink()
    assert len(ConversationDataset(more, processor, max_bad_rate=0.2, cache=tmp_path)) == 23
    assert "a.json: skipped 2 bad samples of 19: 2 missing files" in caplog.text


def test_half_a_character_is_one_bad_sample_and_named(processor):
    with pytest.raises(ValueError, match=r"conversation 'half': its text holds half a character"):
        ConversationDataset([talk("Q", "caf\ud83d", name="half")], processor, max_bad_rate=0)


def test_a_template_that_writes_one_mark_for_two_images_is_found(processor, picture):
    one_mark = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['content'][0]['type'] == 'image' %}<image>{% endif %}{{ m['content'][-1]['text'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Q"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
    ]
    two = Conversation("two", messages, [picture, picture])
    with pytest.raises(ValueError, match=r"conversation 'two': the chat template wrote 1 <image> marks for 2 images"):
        ConversationDataset([two], with_template(processor, one_mark), max_bad_rate=0)
