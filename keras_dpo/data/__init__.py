"""Preference data: sources, records, batches and audits."""

from keras_dpo.data.audit import audit
from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.data.records import DataReport, normalize_records
from keras_dpo.data.sources import read_rows
from keras_dpo.data.stream import PreferenceStream

__all__ = [
    "DataReport",
    "PreferenceDataset",
    "PreferenceStream",
    "audit",
    "normalize_records",
    "read_rows",
]
