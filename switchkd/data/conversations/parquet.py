"""Parquet files with a row a conversation, read lazily: texts as they are asked for, pictures where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from switchkd.data.conversations.lost_pictures import is_picture_key

COLUMNS = ("id", "messages", "images")
ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class ParquetImage:
    """A picture whose bytes lie in a parquet row; like a path, it is opened when it is looked at.

    `column` is the memory-mapped `datasets.Dataset` of the column "images". It is pickled as the names of its files,
    so that data workers share the pictures on the disk.
    """

    column: Any
    row: int
    index: int
    name: str

    def open(self, mode: str = "rb") -> BinaryIO:
        """The picture's file, without copying its bytes."""
        import pyarrow

        cells = self.column[self.row].column("images")[0].values
        return pyarrow.BufferReader(cells.field("bytes")[self.index].as_buffer())

    def __str__(self) -> str:
        return self.name


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The columns "id", "messages" and "images" of a parquet file, or of all `*.parquet` of a folder in the order of
    their names, row by row; "images" as a list of path texts and, where a row stores bytes, `ParquetImage`. Other
    columns are left out, and of those that are named like pictures True stands for each that they hold.

    Read through `datasets`, which keeps a copy in its own cache folder (HF_DATASETS_CACHE) and maps that into memory.
    Raises ImportError where `datasets` is not installed, FileNotFoundError for a folder without parquet files,
    ValueError for files that cannot be read as parquet or have no column "messages".
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path}: holds no *.parquet file; name the folder of the shards, or one file")
    dataset = _load(path, files)
    if "messages" not in dataset.column_names:
        raise ValueError(
            f"{path}: unknown layout: a parquet file needs the column 'messages', a list of role and content, but has"
            f" {', '.join(map(repr, dataset.column_names))}"
        )
    arrow = dataset.with_format("arrow")
    lost = [name for name in dataset.column_names if name not in COLUMNS and is_picture_key(name)]
    arrow = arrow.select_columns([name for name in (*COLUMNS, *lost) if name in dataset.column_names])
    texts = [name for name in arrow.column_names if name in ("id", "messages")]
    pictures = arrow.select_columns(["images"]) if "images" in arrow.column_names else None

    def rows() -> Iterator[dict[str, Any]]:
        row = 0
        for table in arrow.iter(ROWS_AT_ONCE):
            cells = table.column("images") if pictures is not None else None
            for place, record in enumerate(table.select(texts).to_pylist()):
                record["messages"] = _without_nulls(record["messages"])
                record["images"] = [] if cells is None else _images(cells[place], pictures, row, path)
                record |= {name: _held(table.column(name)[place]) for name in lost}
                yield record
                row += 1

    return rows()


def _load(path: Path, files: list[Path]) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{path}: parquet is read by the library datasets, which is not installed: pip install datasets, or write"
            " the conversations as JSON lines"
        ) from error
    try:
        return datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"{path}: cannot be read as parquet ({reason}); replace or remove the broken file") from error


def _images(cell: Any, pictures: Any, row: int, path: Path) -> list[Any]:
    """The items of one row's list: texts, or structs of bytes and path, as Hugging Face stores pictures."""
    import pyarrow

    images: list[Any] = []
    if cell.is_valid and not isinstance(cell, pyarrow.ListScalar):
        raise ValueError(f"{path}, row {row}: images must be a list of paths or pictures, but is a {cell.type}")
    for index, item in enumerate(cell.values if cell.is_valid else ()):
        if not isinstance(item, pyarrow.StructScalar):
            images.append(item.as_py())
        elif "bytes" in item and item["bytes"].is_valid:
            images.append(ParquetImage(pictures, row, index, f"{path}, row {row}, image {index}"))
        else:
            images.append(item["path"].as_py() if "path" in item else None)
    return images


def _held(cell: Any) -> list[bool]:
    """True for each picture of a cell, whose bytes are not copied."""
    import pyarrow

    if isinstance(cell, pyarrow.ListScalar):
        return [True for item in cell.values or () for _ in _held(item)]
    if isinstance(cell, pyarrow.StructScalar):
        return [True] * (cell.is_valid and any(cell[name].is_valid for name in cell))
    if isinstance(cell, pyarrow.BinaryScalar):  # texts too
        return [True] * (cell.is_valid and cell.as_buffer().size > 0)
    return [True] * (cell.is_valid and cell.as_py() > 0)


def _without_nulls(messages: Any) -> Any:
    """Arrow gives every content item every key: an image's "text" is None."""
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            message["content"] = [
                {key: value for key, value in item.items() if value is not None} if isinstance(item, dict) else item
                for item in message["content"]
            ]
    return messages
