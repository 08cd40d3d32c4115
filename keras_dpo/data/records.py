"""Normalizes rows into records of prompt, chosen and rejected."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from keras_dpo.data import layouts
from keras_dpo.data.values import (
    Record,
    Row,
    RowError,
    TieError,
    is_empty,
)
from keras_dpo.errors import UserError

REFERENCE_COLUMNS = (
    "reference_chosen_log_prob",
    "reference_rejected_log_prob",
)
EXTRA_FIELDS = ("weight", "margin", *REFERENCE_COLUMNS)
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
# Columns of context that the model does not see unless something reads them.
CONTEXT_COLUMNS = {
    "tools": "tools",
    "images": "images",
    "image": "images",
    "videos": "videos",
    "video": "videos",
    "audios": "sounds",
    "audio": "sounds",
}


@dataclasses.dataclass
class DataReport:
    """Report of what was found in the data, and what was dropped and why.

    Args:
        layout: The layout detected in the first row.
        num_rows: Rows read.
        dropped: Cause -> numbers of the rows dropped for it.
        unused_columns: Columns that nothing reads.
        unseen_columns: Unused ones that hold tools, images and the like.
        rows: The row number of every record.
        counts: Cause -> number of rows, for what was changed but kept.
        example: One record, as it was parsed.
    """

    layout: str = ""
    num_rows: int = 0
    dropped: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    unused_columns: list[str] = dataclasses.field(default_factory=list)
    unseen_columns: list[str] = dataclasses.field(default_factory=list)
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
        """The report as lines of text."""
        lines = [f"Rows: {self.num_rows} ({self.layout})"]
        for cause, rows in self.dropped.items():
            shown = ", ".join(map(str, rows[:5]))
            more = ", ..." if len(rows) > 5 else ""
            lines.append(f"Dropped: {len(rows)} {cause} (rows {shown}{more})")
        lines += [f"Note: {n} {cause}" for cause, n in self.counts.items()]
        lines += [
            f"Warning: the {CONTEXT_COLUMNS[name]} of {name!r} are not seen by "
            "the model"
            for name in self.unseen_columns
        ]
        unused = sorted({*self.unused_columns} - {*self.unseen_columns})
        if unused:
            lines.append(f"Unused columns: {', '.join(unused)}")
        return lines

    def note_unused(self, row: Row, names: set[str]) -> None:
        """Record columns that nothing reads."""
        if not names.issubset(self.unused_columns):
            self.unused_columns = sorted({*self.unused_columns, *names})
        for name in sorted(names & CONTEXT_COLUMNS.keys()):
            holds = not is_empty(row[name]) and row[name] != "[]"
            if holds and name not in self.unseen_columns:
                self.unseen_columns.append(name)


def normalize_records(
    rows: Iterable[Row],
    column_map: Mapping[str, str] | None = None,
    ranked: str = "best_vs_worst",
) -> tuple[list[Record], DataReport]:
    """Normalize rows of any known layout into records, with a report.

    Args:
        rows: Mappings, all in one layout.
        column_map: Our field name -> the data's column name, such as
            `{"prompt": "question"}`.
        ranked: For scored lists, `"best_vs_worst"` or `"all"` pairs.

    Returns:
        Records with `prompt`, `chosen`, `rejected`, all strings or all lists
        of messages: mappings with `role`, `content` and all other keys
        found, such as `tool_calls`. Optional are `tools`, a list of JSON
        schemas, `weight`, `margin`, `reference_chosen_log_prob` and
        `reference_rejected_log_prob`. Tokenised rows keep `prompt_ids`,
        `chosen_ids` and `rejected_ids`.

    Raises:
        ValueError: No layout fits, or a row is broken; the error names it.

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


def settle_form(
    row: Row,
    column_map: Mapping[str, str] | None = None,
    ranked: str = "best_vs_worst",
) -> tuple[layouts.Form, Row]:
    """Settle how a dataset's rows are read; also returns the first row."""
    if ranked not in ("best_vs_worst", "all"):
        raise UserError(
            "`ranked` must be 'best_vs_worst' or 'all'. Received: "
            f"ranked={ranked!r}."
        )
    row = _renamed(row, 0, column_map)
    try:
        _check_references(row, [x for x in REFERENCE_COLUMNS if x in row])
    except RowError as error:
        raise UserError(f"Row 0, {error}") from error
    return layouts.settle(row, ranked == "all"), row


def each_record(
    rows: Iterable[Row],
    report: DataReport,
    column_map: Mapping[str, str] | None = None,
    ranked: str = "best_vs_worst",
    first: int = 0,
    settled: tuple[layouts.Form, Row] | None = None,
) -> Iterator[tuple[int, Record]]:
    """Yield (row number, record); see `normalize_records`.

    Fills in the report, except its `rows`, which are left to the caller.
    `first` is the number of the first row, and `settled` what `settle_form`
    returned for row 0.
    """
    judged: set[str] = set()
    for number, row in enumerate(rows, first):
        if settled is None:
            settled = settle_form(row, column_map, ranked)
        form, row_0 = settled
        report.layout = form.layout.name
        row = _renamed(row, number, column_map)
        if not judged.issuperset(row):
            _check_form(form, row_0, row, number)
            judged |= {name for name in row if not is_empty(row[name])}
        report.num_rows += 1
        unused = layouts.columns_of(row, form) - form.columns
        report.note_unused(row, unused - _numbers_of(row))
        for record in _convert(form, row, number, report):
            if _same(record):
                report.drop("identical pairs", number)
                continue
            if report.example is None:
                report.example = record
            yield number, record
    if settled is None:
        raise UserError("No rows: nothing to train on.")


def _check_form(form: layouts.Form, first: Row, row: Row, number: int) -> None:
    try:
        layouts.check_form(form, first, row)
    except UserError as error:
        raise UserError(f"Row {number}: {error}") from error


def _convert(
    form: layouts.Form, row: Row, number: int, report: DataReport
) -> list[Record]:
    try:
        records = form.layout.convert(row, form)
        extras = _extras(row)
    except TieError:
        report.drop("ties", number)
        return []
    except RowError as error:
        raise UserError(f"Row {number}, {error}") from error
    if form.layout.convert is layouts.from_messages:
        if not layouts.repeats_its_prompt(row, records[0]):
            report.count("rows whose `prompt` is not in their messages: unused")
    return [{**record, **extras} for record in records]


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
            # Two fields may come from one column.
            renamed.pop(column, None)
    return renamed


def _check_references(row: Row, given: list[str]) -> None:
    """Raise if only one of the two reference log-probs is given."""
    if len(given) == 1:
        missing = next(name for name in REFERENCE_COLUMNS if name not in given)
        raise RowError(
            missing,
            f"there beside {given[0]!r}, or neither, for the reference to be "
            "computed",
            row.get(missing),
        )


def _numbers_of(row: Row) -> set[str]:
    """Numeric columns that every layout reads; scores only in pairs."""
    pairs = [names for names in SCORE_COLUMNS if {*names} <= set(row)]
    return {*EXTRA_FIELDS, *(name for names in pairs for name in names)}


def _extras(row: Row) -> Record:
    extras: Record = {}
    for better, worse in SCORE_COLUMNS:
        if not is_empty(row.get(better)) and not is_empty(row.get(worse)):
            extras["margin"] = _number(row, better) - _number(row, worse)
    for field in EXTRA_FIELDS:
        if not is_empty(row.get(field)):
            extras[field] = _number(row, field)
    _check_references(row, [x for x in REFERENCE_COLUMNS if x in extras])
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
