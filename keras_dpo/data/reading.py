"""Reads rows of a source into tokenised pairs, with a report."""

import hashlib
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import jax
import keras

from keras_dpo.data.pairs import TokenizedPairs
from keras_dpo.data.preprocessor import RECORDS_AT_ONCE, DPOPreprocessor
from keras_dpo.data.records import DataReport, each_record, settle_form
from keras_dpo.data.sources import Rows
from keras_dpo.data.tokenized import Tokenized
from keras_dpo.data.values import Record
from keras_dpo.distribution.processes import of_all_processes
from keras_dpo.errors import UserError

# Number of records kept as text, for samples and examples.
RECORDS_KEPT = 1000


class PairReader:
    """Reads rows one by one and tokenises them, shared among processes.

    Args:
        rows: The source, the same on every process.
        preprocessor: Tokenises the records.
        column_map: Our field name -> the data's column name.
        ranked: For scored lists, `"best_vs_worst"` or `"all"` pairs.

    Attributes:
        report: What was found, dropped and truncated so far.
        records: The first records trained on with a whole prompt, as text.
    """

    def __init__(
        self,
        rows: Rows,
        preprocessor: DPOPreprocessor,
        column_map: dict[str, str] | None = None,
        ranked: str = "best_vs_worst",
    ) -> None:
        self.rows = rows
        self.report = DataReport()
        self.records: list[Record] = []
        self._preprocessor = preprocessor
        self._column_map, self._ranked = column_map, ranked
        self._settled: Any = None

    def read_all(self, verbose: bool) -> TokenizedPairs:
        """Read the pairs of all rows; the report gets their row numbers.

        Args:
            verbose: Whether to show progress.
        """

        def pairs() -> Iterator[Tokenized]:
            for number, pair in self.each_pair(verbose=verbose):
                self.report.rows.append(number)
                yield pair

        return TokenizedPairs(pairs())

    def each_pair(
        self, first: int = 0, verbose: bool = False
    ) -> Iterator[tuple[int, Tokenized]]:
        """Yield (row, pair) to train on; the report gets what is dropped.

        Args:
            first: Number of the first row.
            verbose: Whether to show progress.

        Raises:
            ValueError: A row is broken, on any process, or processes read
                different rows.
        """
        numbered = each_record(
            self._rows_from(first),
            self.report,
            self._column_map,
            self._ranked,
            first,
            self._settled,
        )
        # `process_count` alone would initialize JAX, before devices are
        # chosen.
        met = jax.distributed.is_initialized()
        processes = jax.process_count() if met else 1
        verbose = verbose and not (met and jax.process_index())
        done, bar, report = 0, None, self.report
        part: Any = True
        while part:
            part = list(islice(numbered, RECORDS_AT_ONCE * processes))
            tokenized = self._tokenize(part, processes)
            for (number, record), pair in zip(part, tokenized, strict=True):
                if pair.dropped is not None:
                    report.drop(pair.dropped, number)
                    continue
                for note in dict.fromkeys(pair.notes):
                    report.count(f"rows with {note}")
                report.count("empty answers", _empty_answers(record))
                whole = not any("prompts trunc" in x for x in pair.notes)
                if whole and len(self.records) < RECORDS_KEPT:
                    self.records.append(record)
                yield number, pair
            done += len(part)
            if verbose and done >= RECORDS_AT_ONCE:
                bar = bar or keras.utils.Progbar(
                    self.rows.count, unit_name="row"
                )
                bar.update(report.num_rows)

    def _rows_from(self, first: int) -> Iterator[Any]:
        """Rows from `first` on; row 0 settles the form in any case."""
        rows = iter(self.rows)
        if self._settled is None:
            row = next(rows)
            self._settled = settle_form(row, self._column_map, self._ranked)
            rows = chain([row], rows)
        return islice(rows, first, None)

    def _tokenize(
        self, part: list[tuple[int, Record]], processes: int
    ) -> list[Tokenized]:
        """Tokenise this process's share, and gather those of all."""
        numbers = [number for number, _ in part]
        records = [record for _, record in part]
        if processes == 1:
            return self._preprocessor.tokenize(records, numbers)
        own = slice(jax.process_index(), None, processes)
        failure, pairs = None, []
        mine: Exception | None = None
        try:
            pairs = self._preprocessor.tokenize(records[own], numbers[own])
        except Exception as error:
            # Bugs, too: the other processes wait for this one.
            mine, failure = error, str(error)
        digest = hashlib.blake2b(repr(part).encode(), digest_size=8).hexdigest()
        told = of_all_processes((digest, failure, pairs))
        tokenized: list[Any] = [None] * len(part)
        for process, (digest, failure, pairs) in enumerate(told):
            if digest != told[0][0]:
                raise UserError(
                    f"Processes 0 and {process} read other rows of "
                    f"{self.rows.name}. Give every process the same data."
                )
            if mine is not None:
                raise mine
            if failure is not None:
                raise UserError(failure)
            tokenized[process::processes] = [Tokenized(*x) for x in pairs]
        return tokenized


def _empty_answers(record: Record) -> int:
    count = 0
    for side in ("chosen", "rejected"):
        answer = record.get(side, "x")
        if isinstance(answer, list):
            answer = "".join(
                message["content"] + "calls" * ("tool_calls" in message)
                for message in answer
            )
        count += not answer.strip()
    return count
