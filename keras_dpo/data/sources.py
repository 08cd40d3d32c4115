"""Sources of rows: files, hubs and other libraries' datasets."""

import contextlib
import csv
import json
import os
import pathlib
import re
import sys
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Sized,
)
from itertools import islice, zip_longest
from typing import Any

import numpy as np

from keras_dpo.errors import UserError

FILE_TYPES = (".jsonl", ".json", ".parquet", ".csv")
ROWS_AT_ONCE = 1024
# Line endings of CSV; `str.splitlines` has more, such as U+2028.
LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
PLAIN = {int, float, bool, str, type(None)}


class Rows:
    """Rows read one by one, each time from the first.

    Args:
        read: Starts to read, and returns the rows.
        name: Name of the source in messages.
        count: Number of rows, if known without reading.
        is_endless: Whether they are known never to end.
        splits: Names that a split of them may have.
    """

    def __init__(
        self,
        read: Callable[[], Iterable[Any]],
        name: str,
        count: int | None = None,
        is_endless: bool = False,
        splits: tuple[str, ...] = ("train",),
    ) -> None:
        self.read, self.name, self.count = read, name, count
        self.is_endless, self.splits = is_endless, splits

    @property
    def is_iterator(self) -> bool:
        """Whether they can be read only once."""
        begun = self.read()
        return iter(begun) is begun and begun is self.read()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number = -1
        for number, row in enumerate(self.read()):
            if not isinstance(row, Mapping):
                raise UserError(
                    f"Row {number} must be a mapping of column names to "
                    f"values. Received: {type(row).__name__}."
                )
            yield _plain(row)
        if number < 0:
            raise UserError(f"No rows in {self.name}: nothing to train on.")


def read_rows(source: Any, split: str | None = None) -> list[dict[str, Any]]:
    """All rows of a source, as plain Python data.

    Args:
        source: See `open_rows`.
        split: Split, also of files, such as `"train"` or `"train[:10%]"`.

    Raises:
        ValueError: The source is empty, or cannot be read.
    """
    return list(open_rows(source, split))


def open_rows(
    source: Any, split: str | None = None, streaming: bool = False
) -> Rows:
    """Open the rows of a source, as plain Python data, to be read lazily.

    A json file, and an iterator that is sliced, are held in memory; all else
    is read row by row.

    Args:
        source: A list of mappings; a path to a jsonl, json, parquet or csv
            file, or to a `datasets` directory; the name of a dataset on the
            Hugging Face hub; `"tfds:NAME"`; a `datasets.Dataset`; a TFDS
            builder; a `tf.data` or grain dataset of mappings.
        split: Split to read, such as `"train"` or `"train[:10%]"`; all rows
            of a file are of the split `"train"`.
        streaming: Whether to stream a hub dataset over the network instead of
            downloading it first.

    Raises:
        ValueError: The source cannot be read.
    """
    if isinstance(source, Rows):
        return _slice(source, split)
    if isinstance(source, str | os.PathLike):
        return _open_path(os.fspath(source), split, streaming)
    name = f"the {type(source).__name__}"
    if hasattr(source, "as_dataset") and hasattr(source, "info"):
        return _tfds_rows(lambda s: source.as_dataset(split=s), split, name)
    if isinstance(source, Mapping):
        raise UserError(
            "A source of pairs must hold rows. Received: one mapping with "
            f"{', '.join(map(str, source))}. Name the split: "
            f"{', '.join(f'data[{key!r}]' for key in source)}."
        )
    if hasattr(source, "as_numpy_iterator"):
        # TensorFlow's `INFINITE_CARDINALITY`.
        is_endless = int(source.cardinality()) == -1
        read = source.as_numpy_iterator
        return _slice(Rows(read, name, is_endless=is_endless), split)
    if not isinstance(source, Iterable):
        raise UserError(
            "A source of pairs must be a list of records, a path, or a "
            f"datasets, tf.data, TFDS or grain dataset. Received: "
            f"{type(source).__name__}."
        )
    return _slice(_rows_of(source, name), split)


def has_length(source: Any) -> bool:
    """Whether a source is known to end: a path, or one with a length."""
    if isinstance(source, str | os.PathLike):
        return True
    try:
        # grain's number for a dataset that repeats without end.
        return 0 <= len(source) < sys.maxsize
    except TypeError:
        return False


def _rows_of(source: Iterable[Any], name: str) -> Rows:
    count = len(source) if isinstance(source, Sized) else None
    is_endless = count == sys.maxsize
    own = getattr(source, "split", None)
    # A plain list may be sliced under the default name of a split.
    splits = ("train",) if own is None else ("train", str(own))
    return Rows(
        lambda: source,
        name,
        None if is_endless else count,
        is_endless,
        splits=splits,
    )


def _open_path(path: str, split: str | None, streaming: bool) -> Rows:
    name = repr(path)
    if path.startswith("tfds:"):
        import tensorflow_datasets as tfds

        data = path.removeprefix("tfds:")
        return _tfds_rows(lambda s: tfds.load(data, split=s), split, name)
    file = pathlib.Path(path)
    if file.is_file():
        return _slice(_open_file(file), split)
    import datasets

    if file.is_dir():
        loaded = datasets.load_from_disk(path)
        if isinstance(loaded, Mapping):
            chosen, *others = _names_of(split or "train", list(loaded), name)
            if {*others} - {chosen}:
                raise UserError(
                    "The parts of a split must be of one split. Received: "
                    f"{split!r}. Concatenate the splits of {name} before."
                )
            rows = Rows(
                lambda: loaded[chosen],
                name,
                len(loaded[chosen]),
                splits=(chosen,),
            )
            return _slice(rows, split)
        return _slice(_rows_of(loaded, name), split)
    if file.suffix in FILE_TYPES:
        raise UserError(f"There is no file {path!r}.")
    try:
        loaded = datasets.load_dataset(
            path, split=split or "train", streaming=streaming
        )
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"No file {path!r}, and the Hugging Face hub gives no such "
            f"dataset: {reason}"
        ) from error
    return _rows_of(loaded, name)


def _open_file(file: pathlib.Path) -> Rows:
    name = repr(str(file))
    if file.stat().st_size == 0:
        raise UserError(f"The file {name} is empty.")
    if file.suffix == ".parquet":
        import pyarrow.parquet

        with _readable_parquet(name):
            table = pyarrow.parquet.ParquetFile(file, memory_map=True)
        return Rows(
            lambda: _read_parquet(table, name), name, table.metadata.num_rows
        )
    if file.suffix == ".jsonl":
        return Rows(lambda: _read_json_lines(file), name)
    if file.suffix == ".csv":
        return Rows(lambda: _read_csv(file), name)
    if file.suffix != ".json":
        raise UserError(
            f"A file of pairs must be one of {', '.join(FILE_TYPES)}. "
            f"Received: {name}."
        )
    rows = _parse_json("".join(_read_lines(file)), f"the file {name}")
    if not isinstance(rows, list):
        raise UserError(
            f"The file {name} must hold a list of rows. Received: "
            f"{type(rows).__name__}. One object a line is .jsonl."
        )
    return Rows(lambda: rows, name, len(rows))


def _read_parquet(table: Any, name: str) -> Iterator[Any]:
    parts = table.iter_batches(ROWS_AT_ONCE)
    while True:
        with _readable_parquet(name):
            part = next(parts, None)
        if part is None:
            return
        yield from part.to_pylist()


@contextlib.contextmanager
def _readable_parquet(name: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"The file {name} is not parquet: {reason}") from error


def _read_lines(file: pathlib.Path) -> Iterator[str]:
    """Lines with their endings, split at newlines only."""
    done = 0
    with open(file, "rb") as lines:
        for line in lines:
            try:
                text = line.decode("utf-8-sig" if done == 0 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"The file {str(file)!r} must be UTF-8: byte "
                    f"{done + error.start} is not."
                ) from error
            done += len(line)
            yield text


def _read_csv(file: pathlib.Path) -> Iterator[Any]:
    lines = (part for line in _read_lines(file) for part in LINE.findall(line))
    try:
        yield from _read_cells(csv.reader(lines), f"the file {str(file)!r}")
    except csv.Error as error:
        raise UserError(f"The file {str(file)!r} is not CSV: {error}") from (
            error
        )


def _read_cells(
    lines: Iterator[list[str]], name: str
) -> Iterator[dict[str, str | None]]:
    """Rows under the names of the first line; blank lines are no rows."""
    header = next(lines, [])
    for column in header:
        if header.count(column) > 1:
            raise UserError(
                f"{name} names the column {column!r} twice. Rename one of them."
            )
    for number, cells in enumerate(cells for cells in lines if cells):
        if len(cells) > len(header):
            raise UserError(
                f"Row {number} of {name} has {len(cells)} cells, and its "
                f"header names {len(header)}. Quote cells that hold a comma."
            )
        # A cell that is missing is refused where it is needed.
        yield dict(zip_longest(header, cells))


def _read_json_lines(file: pathlib.Path) -> Iterator[Any]:
    for number, line in enumerate(_read_lines(file), 1):
        if line.strip():
            yield _parse_json(line, f"line {number} of {str(file)!r}")


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error


def _slice(rows: Rows, split: str | None) -> Rows:
    """Slice rows by a split such as `"train[:10%]"`, as `datasets` does.

    Raises:
        ValueError: There is no such split, or it cannot be parsed.
    """
    if not split:
        return rows
    names = _names_of(split, rows.splits, rows.name)
    if not re.search(r"[\[+(]", split):
        return rows
    import datasets

    held, count = None, rows.count
    if count is None and rows.is_iterator:
        held = list(rows.read())
    if count is None:
        count = len(held) if held is not None else sum(1 for _ in rows.read())
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(
            dict.fromkeys(names, count)
        )
    except (ValueError, AssertionError) as error:
        raise UserError(f"The split {split!r} cannot be read: {error}") from (
            error
        )

    def read_parts() -> Iterator[Any]:
        for part in parts:
            every = rows.read() if held is None else held
            yield from islice(every, part.from_, part.to)

    return Rows(
        read_parts, rows.name, sum(part.to - part.from_ for part in parts)
    )


def _names_of(split: str, known: Sequence[str], name: str) -> list[str]:
    """Names of the splits in one such as `"train[:5%]+train[9%:]"`."""
    names = [part.split("[")[0].strip() for part in split.split("+")]
    for missing in set(names) - set(known):
        raise UserError(
            f"There is no split {missing!r} in {name}. Its splits: "
            f"{', '.join(known)}. Parts of one are such as {known[0]}[:10%]."
        )
    return names


def _tfds_rows(
    load: Callable[[str], Any], split: str | None, name: str
) -> Rows:
    import tensorflow_datasets as tfds

    try:
        dataset = load(split or "train")
    except ValueError as error:
        raise UserError(
            f"{name} gives no split {split or 'train'!r}: {error}"
        ) from error
    rows = tfds.as_numpy(dataset)
    return Rows(lambda: rows, name)


def _plain(value: Any) -> Any:
    """Convert bytes to text, arrays to lists, message columns to messages."""
    if isinstance(value, bytes | np.bytes_):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, Mapping):
        plain = {str(key): _plain(item) for key, item in value.items()}
        for names in ({"role", "content"}, {"from", "value"}):
            if names <= set(plain) and isinstance(plain[min(names)], list):
                columns = _columns(plain)
                if columns is not None:
                    return columns
        return plain
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        if PLAIN.issuperset(map(type, value)):
            return list(value)
        return [_plain(item) for item in value]
    return value


def _columns(columns: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Messages from columns of equal length, with every key; else None."""
    lists = [value for value in columns.values() if isinstance(value, list)]
    if len(lists) < len(columns) or len(set(map(len, lists))) > 1:
        return None
    rows = zip(*lists, strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]
