"""Direct Preference Optimization for Keras 3 on JAX, `fit`-style."""

import os
import pathlib
import sys

# The command owns its process and sets the backend; a plain import keeps a
# backend that the user set explicitly, and rejects it below.
_is_command = pathlib.Path(sys.argv[0] if sys.argv else "").name in (
    "keras-dpo",
    "-m",
)
if _is_command and "keras" not in sys.modules:
    os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("KERAS_BACKEND", "jax")

import keras  # noqa: E402

if keras.config.backend() != "jax":
    raise ImportError(
        "keras_dpo needs the JAX backend of Keras. Received: "
        f"backend={keras.config.backend()!r}. Set the environment variable "
        "KERAS_BACKEND=jax before Keras is imported. In a notebook that is "
        "running, restart the kernel and make this its first cell: "
        'import os; os.environ["KERAS_BACKEND"] = "jax"'
    )

from keras_dpo import data  # noqa: E402, I001  (the preprocessor needs it)
from keras_dpo import callbacks, distribution, losses  # noqa: E402
from keras_dpo.runs.config import DPOConfig  # noqa: E402
from keras_dpo.data.dataset import PreferenceDataset  # noqa: E402
from keras_dpo.training.dpo_model import DPOModel  # noqa: E402
from keras_dpo.policies.generation import generate  # noqa: E402
from keras_dpo.data.preprocessor import DPOPreprocessor  # noqa: E402
from keras_dpo.policies.presets import load_policy, save_policy  # noqa: E402
from keras_dpo.runs.train import train  # noqa: E402
from keras_dpo.scoring.execution import Execution  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "DPOConfig",
    "DPOModel",
    "DPOPreprocessor",
    "Execution",
    "PreferenceDataset",
    "callbacks",
    "data",
    "distribution",
    "generate",
    "load_policy",
    "losses",
    "save_policy",
    "train",
]
