"""Keras callbacks for preference training."""

from keras_dpo.callbacks.reference_sync import ReferenceSync

__all__ = ["ReferenceSync"]
