"""Where rows come from: files, hubs and other libraries' datasets."""

import csv
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

FILE_TYPES = (".jsonl", ".json", ".parquet", ".csv")


def read_rows(source: Any, split: str | None = None) -> list[dict[str, Any]]:
    """All rows of a source, as plain Python data.

    Args:
        source: A list of mappings; a path to a jsonl, json, parquet or csv
            file, or to a `datasets` directory; the name of a dataset on the
            Hugging Face hub; `"tfds:NAME"`; a `datasets.Dataset`; a TFDS
            builder; a `tf.data` or grain dataset of mappings.
        split: Such as `"train"` or `"train[:10%]"`; for files too.

    Raises:
        ValueError: The source is empty, or cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        rows = _read_path(os.fspath(source), split)
    elif hasattr(source, "as_dataset") and hasattr(source, "info"):
        rows = _numpy_rows(source.as_dataset(split=split or "train"))
    elif hasattr(source, "as_numpy_iterator"):
        rows = _slice(list(source.as_numpy_iterator()), split)
    elif isinstance(source, Mapping):
        raise ValueError(
            "A source of pairs must hold rows. Received: one mapping with "
            f"{', '.join(map(str, source))}. Name the split: "
            f"{', '.join(f'data[{key!r}]' for key in source)}."
        )
    elif isinstance(source, Iterable):
        rows = _slice(list(source), split)
    else:
        raise ValueError(
            "A source of pairs must be a list of records, a path, or a "
            f"datasets, tf.data, TFDS or grain dataset. Received: "
            f"{type(source).__name__}."
        )
    if not rows:
        raise ValueError(f"No rows in {_name(source)}: nothing to train on.")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"Row {number} must be a mapping of column names to values. "
                f"Received: {type(row).__name__}."
            )
    return [_plain(row) for row in rows]


def _name(source: Any) -> str:
    if isinstance(source, str | os.PathLike):
        return repr(os.fspath(source))
    return f"the {type(source).__name__}"


def _read_path(path: str, split: str | None) -> Sequence[Any]:
    if path.startswith("tfds:"):
        import tensorflow_datasets as tfds

        return _numpy_rows(
            tfds.load(path.removeprefix("tfds:"), split=split or "train")
        )
    file = pathlib.Path(path)
    if file.is_file():
        return _slice(_read_file(file), split)
    import datasets

    if file.is_dir():
        loaded = datasets.load_from_disk(path)
        if isinstance(loaded, Mapping):
            loaded = loaded[(split or "train").split("[")[0]]
        return _slice(list(loaded), split)
    if file.suffix in FILE_TYPES:
        raise ValueError(f"There is no file {path!r}.")
    try:
        return list(datasets.load_dataset(path, split=split or "train"))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"No file {path!r}, and the Hugging Face hub gives no such "
            f"dataset: {reason}"
        ) from error


def _read_file(file: pathlib.Path) -> Sequence[Any]:
    if file.stat().st_size == 0:
        raise ValueError(f"The file {str(file)!r} is empty.")
    if file.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(file).to_pylist()
    if file.suffix not in FILE_TYPES:
        raise ValueError(
            f"A file of pairs must be one of {', '.join(FILE_TYPES)}. "
            f"Received: {str(file)!r}."
        )
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"The file {str(file)!r} must be UTF-8: byte {error.start} is not."
        ) from error
    if file.suffix == ".csv":
        return list(csv.DictReader(text.splitlines(keepends=True)))
    if file.suffix == ".jsonl":
        return [
            _parse_json(line, f"line {number} of {str(file)!r}")
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    rows = _parse_json(text, f"the file {str(file)!r}")
    if not isinstance(rows, list):
        raise ValueError(
            f"The file {str(file)!r} must hold a list of rows. Received: "
            f"{type(rows).__name__}. One object a line is .jsonl."
        )
    return rows


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def _slice(rows: Sequence[Any], split: str | None) -> Sequence[Any]:
    """The part of the rows that `"train[:10%]"` names, as `datasets` does."""
    if not split or "[" not in split:
        return rows
    import datasets

    name = split.split("[")[0]
    parts = datasets.ReadInstruction.from_spec(split)
    parts = parts.to_absolute({name: len(rows)})
    return [row for part in parts for row in rows[part.from_ : part.to]]


def _numpy_rows(dataset: Any) -> list[Any]:
    import tensorflow_datasets as tfds

    return list(tfds.as_numpy(dataset))


def _plain(value: Any) -> Any:
    """Bytes to text, arrays to lists, columns of messages to messages."""
    if isinstance(value, bytes | np.bytes_):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, Mapping):
        plain = {str(key): _plain(item) for key, item in value.items()}
        for names in ({"role", "content"}, {"from", "value"}):
            columns = names <= set(plain)
            if columns and all(isinstance(plain[n], list) for n in names):
                first, second = sorted(names, reverse=True)
                return [
                    {first: a, second: b}
                    for a, b in zip(plain[first], plain[second], strict=True)
                ]
        return plain
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
