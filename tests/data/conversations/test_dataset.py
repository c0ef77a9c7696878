import pytest
import torch
from talks import STRICT, TURNS, talk, with_template

from switchkd.data import Conversation, ConversationDataset, encode
from switchkd.data.conversations.sample_check import SampleCheck


def test_the_share_of_what_the_template_refuses_is_skipped(processor, caplog):
    strict = with_template(processor, STRICT + processor.chat_template)
    conversations = [talk("Q", "A"), talk("Q", "A", system="Be brief.", name="s"), talk("Q", "A")]
    assert len(ConversationDataset(conversations, strict, max_bad_rate=0.4)) == 2
    assert "conversation 's': the chat template cannot render it (TemplateError: begin with user)" in caplog.text


def test_dataset_skips_and_reports_bad_samples(processor, picture, caplog):
    good = [talk("Q", f"answer {i}", name=f"g{i}") for i in range(18)]
    bad = [
        talk("Q", " ", name="empty"),
        Conversation("lost", talk("Q", "A").messages, [picture.parent / "no.jpg"]),
    ]
    with pytest.raises(ValueError, match=r"training conversations: 2 of 20 samples are bad.*'empty'.*'lost'"):
        ConversationDataset(good + bad, processor)
    dataset = ConversationDataset(good + bad, processor, max_bad_rate=0.1)
    assert len(dataset) == 18
    assert "skipped 2 bad samples of 20" in caplog.text
    expected = encode(good[3], processor)
    assert all(
        torch.equal(value, expected[key]) for key, value in dataset[3].items() if isinstance(value, torch.Tensor)
    )


@pytest.mark.parametrize("images", [0, 1, 3])
def test_dataset_stops_when_max_length_leaves_no_supervision(processor, images):
    conversations = [talk("Q" * (1 + i % 3), "yes", images=images) for i in range(6)]
    lengths = [len(encode(each, processor)["input_ids"]) for each in conversations]
    # "yes", its end token and the template's line break are the last ids: one more and nothing is supervised.
    answer = len(encode(conversations[0], processor)["labels"]) - int(
        (encode(conversations[0], processor)["labels"] != -100).nonzero()[0]
    )
    assert len(ConversationDataset(conversations, processor, max(lengths) - answer + 1)) == 6
    with pytest.raises(ValueError, match=r"(no answer token is left|cuts image tokens)"):
        ConversationDataset(conversations, processor, min(lengths) - answer, max_bad_rate=0.5)


@pytest.mark.parametrize("images", [0, 1, 3])
def test_the_check_and_encode_agree_on_every_length(processor, images):
    conversation = talk(*TURNS, images=images)
    whole = len(encode(conversation, processor)["input_ids"])
    verdicts = []
    for max_length in range(1, whole + 1):
        said = []
        for judge in (
            lambda length=max_length: encode(conversation, processor, length),
            lambda length=max_length: SampleCheck(processor, length)(conversation),
        ):
            try:
                found = judge()
                said.append("")
            except ValueError as error:
                said.append(str(error))
        assert said[0] == said[1]
        verdicts.append(bool(said[0]))
        if not said[0]:
            labels = encode(conversation, processor, max_length)["labels"]
            assert found == (len(labels), int((labels != -100).sum()), max_length < whole, "", False)
    assert verdicts == sorted(verdicts, reverse=True)
    assert set(verdicts) == {True, False}


def test_what_shows_only_in_decoding_names_the_sample(processor, picture):
    whole = picture.read_bytes()
    dataset = ConversationDataset([Conversation("c", talk("Q", "A").messages, [picture])], processor)
    assert len(dataset[0]["labels"]) > 0
    picture.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(ValueError, match=r"conversation 'c': .*plate\.jpg: cannot be .*remove it\. .*does not skip it"):
        dataset[0]
    picture.unlink()
    with pytest.raises(FileNotFoundError, match=r"conversation 'c': .*no such image file.* does not skip it"):
        dataset[0]
