"""Rows as they are found -> records of prompt, chosen and rejected."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from keras_dpo.data import layouts
from keras_dpo.data.layouts import Record, Row, RowError, TieError
from keras_dpo.errors import UserError

EXTRA_FIELDS = (
    "weight",
    "margin",
    "reference_chosen_log_prob",
    "reference_rejected_log_prob",
)
TEXT_FIELDS = ("prompt", "chosen", "rejected")
ID_FIELDS = ("prompt_ids", "chosen_ids", "rejected_ids")
SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-score", "rejected-score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)


@dataclasses.dataclass
class DataReport:
    """What was found in the data, and what was dropped and why.

    Args:
        layout: The layout detected in the first row.
        num_rows: Rows read.
        dropped: Cause -> numbers of the rows dropped for it.
        unused_columns: Columns that nothing reads.
        rows: The row number of every record.
        counts: Cause -> number of rows, for what was changed but kept.
        example: One record as it was understood.
    """

    layout: str = ""
    num_rows: int = 0
    dropped: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    unused_columns: list[str] = dataclasses.field(default_factory=list)
    rows: list[int] = dataclasses.field(default_factory=list)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    example: Record | None = None

    def drop(self, cause: str, row: int) -> None:
        """Count a row as dropped."""
        self.dropped.setdefault(cause, []).append(row)

    def count(self, cause: str, number: int = 1) -> None:
        """Count something that happened to a row that is kept."""
        if number:
            self.counts[cause] = self.counts.get(cause, 0) + number

    def lines(self) -> list[str]:
        """The report as text, a line each."""
        lines = [f"Rows: {self.num_rows} ({self.layout})"]
        for cause, rows in self.dropped.items():
            shown = ", ".join(map(str, rows[:5]))
            more = ", ..." if len(rows) > 5 else ""
            lines.append(f"Dropped: {len(rows)} {cause} (rows {shown}{more})")
        lines += [f"Note: {n} {cause}" for cause, n in self.counts.items()]
        if self.unused_columns:
            lines.append(f"Unused columns: {', '.join(self.unused_columns)}")
        return lines


def normalize_records(
    rows: Iterable[Row],
    column_map: Mapping[str, str] | None = None,
    ranked: str = "best_vs_worst",
) -> tuple[list[Record], DataReport]:
    """Rows in any known layout -> records, and what happened on the way.

    Args:
        rows: Mappings, all in one layout.
        column_map: Our field name -> the data's column name, such as
            `{"prompt": "question"}`.
        ranked: For scored lists, `"best_vs_worst"` or `"all"` pairs.

    Returns:
        Records with `prompt`, `chosen`, `rejected`, all strings or all lists
        of `{"role", "content"}`, and the optional `weight`, `margin`,
        `reference_chosen_log_prob`, `reference_rejected_log_prob`. Tokenised
        rows keep `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Raises:
        ValueError: No layout fits, or a row is broken; it is named.

    Example:

    >>> records, report = normalize_records(
    ...     [{"question": "2+2?", "chosen": "4", "rejected": "5"}])
    >>> records
    [{'prompt': '2+2?', 'chosen': '4', 'rejected': '5'}]
    """
    report = DataReport()
    numbered = list(each_record(rows, report, column_map, ranked))
    report.rows = [number for number, _ in numbered]
    return [record for _, record in numbered], report


def each_record(
    rows: Iterable[Row],
    report: DataReport,
    column_map: Mapping[str, str] | None = None,
    ranked: str = "best_vs_worst",
    first: int = 0,
) -> Iterator[tuple[int, Record]]:
    """(row number, record) one by one; see `normalize_records`.

    What happened on the way is written into the report; its `rows` are left
    to the caller. `first` is the number of the first row.
    """
    if ranked not in ("best_vs_worst", "all"):
        raise UserError(
            "`ranked` must be 'best_vs_worst' or 'all'. Received: "
            f"ranked={ranked!r}."
        )
    layout = None
    unused: set[str] = set()
    scores = [name for pair in SCORE_COLUMNS for name in pair]
    for number, row in enumerate(rows, first):
        row = _renamed(row, number, column_map)
        if layout is None:
            layout = layouts.detect(row)
            report.layout = layout.name
            used = {*layout.columns, *EXTRA_FIELDS, *scores}
        report.num_rows += 1
        unused |= row.keys() - used
        for record in _convert(layout, row, number, ranked, report):
            if _same(record):
                report.drop("identical pairs", number)
                continue
            if report.example is None:
                report.example = record
            yield number, record
    if layout is None and first == 0:
        raise UserError("No rows: nothing to train on.")
    report.unused_columns = sorted({*report.unused_columns, *unused})


def _convert(
    layout: layouts.Layout,
    row: Row,
    number: int,
    ranked: str,
    report: DataReport,
) -> list[Record]:
    try:
        records = layout.convert(row, ranked == "all")
        extras = _extras(row)
        return [{**record, **extras} for record in records]
    except TieError:
        report.drop("ties", number)
        return []
    except RowError as error:
        raise UserError(f"Row {number}, {error}") from error


def _renamed(
    row: Row, number: int, column_map: Mapping[str, str] | None
) -> Row:
    if not isinstance(row, Mapping):
        raise UserError(
            f"Row {number} must be a mapping of column names to values. "
            f"Received: {type(row).__name__}."
        )
    renamed = dict(row)
    column_map = column_map or {}
    for field, column in column_map.items():
        if column not in row:
            raise UserError(
                f"Row {number} has no column {column!r}, which column_map "
                f"gives for {field!r}. Its columns: {', '.join(row)}."
            )
        renamed[field] = row[column]
        if column not in column_map:
            renamed.pop(column)
    return renamed


def _extras(row: Row) -> Record:
    extras: Record = {}
    for better, worse in SCORE_COLUMNS:
        if row.get(better) is not None and row.get(worse) is not None:
            extras["margin"] = _number(row, better) - _number(row, worse)
    for field in EXTRA_FIELDS:
        if row.get(field) is not None:
            extras[field] = _number(row, field)
    if extras.get("weight", 1.0) < 0:
        raise RowError("weight", "0 or more", row["weight"])
    return extras


def _number(row: Row, field: str) -> float:
    try:
        number = float(row[field])
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < float("inf"):
        raise RowError(field, "a finite number", row[field])
    return number


def _same(record: Record) -> bool:
    fields = ID_FIELDS if "chosen_ids" in record else TEXT_FIELDS
    return record[fields[1]] == record[fields[2]]
