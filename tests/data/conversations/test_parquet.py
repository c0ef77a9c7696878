"""`messages` in parquet: one file or shards, pictures beside it or inside."""

import builtins
import io
import pickle

import pytest
import torch
from PIL import Image

from switchkd.data import Conversation, ConversationDataset, encode, read_messages
from switchkd.data.config import DataConfig
from switchkd.data.conversations import parquet
from switchkd.data.conversations.parquet import ParquetImage
from switchkd.data.images import check_image, load_image
from switchkd.data.sources import load_conversations

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")


def row(number, images, question="<image>\nIs it whole?"):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"answer {number}"}]
    return {"id": number, "messages": messages, "images": images}


def stored(number, format="JPEG"):
    file = io.BytesIO()
    Image.effect_noise((40 + number, 30), 80).convert("RGB").save(file, format)
    return {"bytes": file.getvalue(), "path": f"{number}.jpg"}


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def same_sample(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name]


def test_paths_below_the_root(picture, processor):
    path = write(picture.parent / "a.parquet", [row(7, ["plate.jpg"]), row(8, [], "Hello")])
    one, two = read_messages(path, picture.parent)
    assert (one.id, one.images, two.id, two.images) == ("7", [picture.resolve()], "8", [])
    assert one.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "Is it whole?"}]
    assert len(ConversationDataset([one, two], processor, max_bad_rate=0)) == 2
    write(path, [row(7, ["../plate.jpg"])])
    with pytest.raises(ValueError, match=r"a\.parquet, row 0: image path .* outside its data root"):
        read_messages(path, picture.parent)


def test_pictures_stored_in_rows(tmp_path, processor):
    rows = [row(number, [stored(number), stored(number + 1, "PNG")], "<image><image>Same?") for number in range(3)]
    path = write(tmp_path / "a.parquet", rows)
    read = list(read_messages(path, tmp_path))
    dataset = ConversationDataset(read, processor, max_bad_rate=0)
    for number, conversation in enumerate(read):
        assert [str(image) for image in conversation.images] == [
            f"{path}, row {number}, image {index}" for index in range(2)
        ]
        assert [check_image(image) for image in conversation.images] == [(40 + number, 30), (41 + number, 30)]
        pictures = [Image.open(io.BytesIO(each["bytes"])) for each in rows[number]["images"]]
        expected = encode(Conversation(conversation.id, conversation.messages, pictures), processor)
        same_sample(dataset[number], expected)


def test_what_hugging_face_writes(tmp_path, processor):
    """Content as items, of which Arrow fills the missing keys, and pictures of an Image feature."""
    content = [{"type": "image"}, {"type": "text", "text": "Is it whole?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [content[1]]}]
    items = [{"type": datasets.Value("string"), "text": datasets.Value("string")}]
    features = datasets.Features(
        {"messages": [{"role": datasets.Value("string"), "content": items}], "images": [datasets.Image()]}
    )
    row = {"messages": messages, "images": [stored(0)]}
    datasets.Dataset.from_list([row], features=features).to_parquet(tmp_path / "a.parquet")
    (read,) = read_messages(tmp_path / "a.parquet", tmp_path)
    assert read.id == "a-0"
    assert read.messages[0]["content"] == content
    assert isinstance(read.images[0], ParquetImage)
    assert len(ConversationDataset([read], processor, max_bad_rate=0)) == 1


def test_a_picture_without_bytes_is_its_path(picture):
    images = [{"bytes": None, "path": "plate.jpg"}, stored(0)]
    path = write(picture.parent / "a.parquet", [row(0, images, "<image><image>Same?")])
    (read,) = read_messages(path, picture.parent)
    assert read.images[0] == picture.resolve()
    assert [check_image(image) for image in read.images] == [(40, 30), (40, 30)]


def test_a_folder_of_shards_is_read_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS_AT_ONCE", 4)
    for shard in (1, 0, 2):
        write(
            tmp_path / "shards" / f"train-{shard:05d}.parquet",
            [row(10 * shard + i, [stored(10 * shard + i)]) for i in range(2)],
        )
    read = list(read_messages(tmp_path / "shards", tmp_path))
    assert [each.id for each in read] == ["0", "1", "10", "11", "20", "21"]
    assert [load_image(each.images[0]).size for each in read] == [(40 + int(each.id), 30) for each in read]
    config = DataConfig(
        source="messages", root=str(tmp_path), train_split=str(tmp_path / "shards"), test_split=None, train_images=3
    )
    assert len(load_conversations(config).train) == 3
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"none: holds no \*\.parquet file"):
        read_messages(tmp_path / "none", tmp_path)


def test_pictures_stay_on_the_disk_and_travel_as_file_names(tmp_path, processor):
    big = Image.effect_noise((500, 500), 200).convert("RGB")
    file = io.BytesIO()
    big.save(file, "PNG")
    path = write(tmp_path / "a.parquet", [row(0, [{"bytes": file.getvalue(), "path": None}])] * 3)
    dataset = ConversationDataset(read_messages(path, tmp_path), processor)
    sent = pickle.dumps(dataset.conversations)
    assert len(sent) < 5_000 < len(file.getvalue())
    copy = pickle.loads(sent)
    assert load_image(copy[2].images[0]).tobytes() == big.tobytes()
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    same_sample(next(iter(loader)), dataset[0])


def test_broken_pictures_are_named_by_their_row(tmp_path, processor):
    bad = stored(0)
    bad["bytes"] = bad["bytes"][:-90]
    path = write(
        tmp_path / "a.parquet", [row(0, [stored(0)]), row(1, [bad]), row(2, [{**bad, "bytes": b"no picture"}])]
    )
    with pytest.raises(
        ValueError, match=r"2 of 3 .*a\.parquet, row 1, image 0: cannot be decoded.*row 2, image 0: can"
    ):
        ConversationDataset(read_messages(path, tmp_path), processor, max_bad_rate=0.5)


def test_rows_that_cannot_be_used_are_named(tmp_path):
    path = write(tmp_path / "a.parquet", [row(0, []), row(1, [], "Hello")])
    with pytest.raises(ValueError, match=r"a\.parquet, row 0: has 0 images but 1 <image> marks"):
        read_messages(path, tmp_path)
    assert [each.id for each in read_messages(path, tmp_path, max_bad_rate=0.5)] == ["1"]
    write(tmp_path / "b.parquet", [{"text": "a"}])
    with pytest.raises(ValueError, match=r"b\.parquet: unknown layout: .*column 'messages', .* but has 'text'"):
        read_messages(tmp_path / "b.parquet", tmp_path)
    (tmp_path / "c.parquet").write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"c\.parquet: cannot be read as parquet \(.*; replace or remove"):
        read_messages(tmp_path / "c.parquet", tmp_path)
    write(tmp_path / "d.parquet", [row(0, [{"bytes": None, "path": None}])])
    with pytest.raises(ValueError, match=r"d\.parquet, row 0: image paths must be text"):
        read_messages(tmp_path / "d.parquet", tmp_path)


def test_without_datasets_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [row(0, [], "Hello")])
    imports = builtins.__import__

    def refuse(name, *arguments, **options):
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return imports(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(
        ImportError, match=r"a\.parquet: parquet is read by the library datasets, which is not installed"
    ):
        read_messages(path, tmp_path)


def test_pictures_in_a_column_that_is_not_read_are_a_bad_sample(tmp_path):
    picture = stored(0)
    kept = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "image": pa.array([None, picture], kept),
        "image_bytes": pa.array([b"", picture["bytes"]]),
        "videos": pa.array([[], ["a.mp4", "b.mp4"]]),
        "image_path": pa.array([None, "plate.jpg"]),
        "frames": pa.array([None, [None, picture]], pa.list_(kept)),
        "image_id": pa.array([-1, 7]),
        "audio": pa.array([None, None], pa.string()),
        "image_caption": pa.array(["", "A plate."]),
    }
    table = pa.Table.from_pylist([row(number, [], "What is it?") for number in range(2)]).drop_columns("images")
    for name, column in columns.items():
        table = table.append_column(name, column)
    pq.write_table(table, tmp_path / "a.parquet")
    first, second = parquet.parquet_rows(tmp_path / "a.parquet")
    lost = {name: first[name] for name in columns if name in first}
    assert lost == {name: [] for name in columns if name != "image_caption"}
    held = {"image": 1, "image_bytes": 1, "videos": 2, "image_path": 1, "frames": 1, "image_id": 1, "audio": 0}
    assert {name: second[name] for name in lost} == {name: [True] * count for name, count in held.items()}
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: its key 'image' holds 1 pictures and 'images', which"):
        read_messages(tmp_path / "a.parquet", tmp_path)
    assert [each.id for each in read_messages(tmp_path / "a.parquet", tmp_path, max_bad_rate=0.5)] == ["0"]
