"""Every private part of Keras, Keras-Hub, JAX and transformers that we use.

pyproject.toml bounds Keras and Keras-Hub from above; before a bound is raised,
these tests name what the new version no longer has.
"""

import ast
import importlib

import keras
import numpy as np
import pytest
from conftest import ROOT, tiny_policy

SOURCES = {
    path.name: ast.parse(path.read_text())
    for path in sorted((ROOT / "keras_dpo").rglob("*.py"))
}
# Documented, in spite of their names.
PUBLIC = {"_replace", "_fields"}


def built(layer, *shape):
    layer.build(shape)
    return layer


def dense():
    return built(keras.layers.Dense(2), 1, 3)


def compiled():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def in_a_step():
    """A model as a callback sees it in the middle of `fit`."""
    seen = {}

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.update(self._model.__dict__)

    data = np.zeros((2, 3)), np.zeros((2, 1))
    compiled().fit(*data, verbose=0, callbacks=[Look()])
    return seen


def epoch_iterator():
    data = np.zeros((2, 3)), np.zeros((2, 1))
    return keras.src.backend.jax.trainer.JAXEpochIterator(*data, batch_size=2)


def phi3_attention():
    from keras_hub.src.models.phi3 import phi3_attention

    return built(phi3_attention.Phi3Attention(4, 2), 1, 3, 8)


def smollm3():
    from keras_hub.src.models.smollm3 import smollm3_layers

    return smollm3_layers


def rotary_embedding():
    from keras_hub.src.layers.modeling import rotary_embedding

    return rotary_embedding.RotaryEmbedding


def variable():
    return keras.Variable(np.zeros(2))


# Owner and name -> how to get the owner. Owners are made, for many parts are
# attributes of an object and not of its class.
PARTS = {
    "Layer._flatten_layers": dense,
    "Layer._tracker": dense,
    "Layer._trainable_variables": dense,
    "Layer._non_trainable_variables": dense,
    "Dense._kernel": dense,
    "Embedding._embeddings": lambda: built(keras.layers.Embedding(4, 2), 1),
    "Model._assert_compile_called": compiled,
    "Model._loss_tracker": compiled,
    "Model._compiled_trainable_state": compiled,
    "Model._purge_model_variables": compiled,
    "Model._symbolic_build": compiled,
    "Model._jax_state": in_a_step,
    "Model._jax_state_synced": in_a_step,
    "Functional._standardize_inputs": lambda: tiny_policy().backbone,
    "Functional._run_through_graph": lambda: tiny_policy().backbone,
    "Callback._model": keras.callbacks.Callback,
    "SwapEMAWeights._swap_variables": keras.callbacks.SwapEMAWeights,
    "SwapEMAWeights._finalize_ema_values": keras.callbacks.SwapEMAWeights,
    "Optimizer._iterations": lambda: compiled().optimizer,
    "Variable._value": variable,
    "Variable._layout": variable,
    "Variable._initialize_layout": variable,
    "Variable._initializer": variable,
    "Variable._initialize_with_initializer": variable,
    "jax.trainer.jit": lambda: keras.src.backend.jax.trainer,
    "jax.trainer.JAXEpochIterator": lambda: keras.src.backend.jax.trainer,
    "JAXEpochIterator._enumerate_iterator": epoch_iterator,
    "JAXEpochIterator._num_batches": epoch_iterator,
    "JAXEpochIterator.data_adapter": epoch_iterator,
    "functional.operation_fn": lambda: importlib.import_module(
        "keras.src.models.functional"
    ),
    "ops.matmul": lambda: keras.src.ops,
    "ops.einsum": lambda: keras.src.ops,
    "Phi3Attention._inv_norm_factor": phi3_attention,
    "Phi3Attention._compute_attention": phi3_attention,
    "Phi3Attention.num_key_value_groups": phi3_attention,
    "SmolLM3Attention._compute_attention": lambda: smollm3().SmolLM3Attention,
    "SmolLM3RotaryEmbedding.call": lambda: smollm3().SmolLM3RotaryEmbedding,
    "RotaryEmbedding._compute_cos_sin_embedding": rotary_embedding,
    "chat_template_utils._compile_jinja_template": lambda: (
        importlib.import_module("transformers.utils.chat_template_utils")
    ),
}


@pytest.mark.parametrize("part", list(PARTS))
def test_it_is_still_there(part):
    name = part.rpartition(".")[2]
    owner = PARTS[part]()
    there = name in owner if isinstance(owner, dict) else hasattr(owner, name)
    assert there, f"{part} is gone (Keras {keras.__version__})"


def nodes(kind):
    return [
        node
        for tree in SOURCES.values()
        for node in ast.walk(tree)
        if isinstance(node, kind)
    ]


def private_paths():
    """Dotted names such as `keras.src.ops`; `module:name` where imported."""
    prefixes = ("keras.src", "keras_hub.src", "jax._src", "jax.experimental",
                "transformers.")  # fmt: skip
    found = set()
    for node in nodes(ast.ImportFrom):
        if (node.module or "").startswith(prefixes):
            found |= {f"{node.module}:{alias.name}" for alias in node.names}
    for node in nodes(ast.Attribute):
        text = ast.unparse(node)
        if text.startswith(("keras.src.", "keras_hub.src.", "jax._src.")):
            found.add(text)
    return sorted(found)


@pytest.mark.parametrize("path", private_paths())
def test_its_module_is_still_there(path):
    module, _, imported = path.partition(":")
    if imported:
        owner = importlib.import_module(module)
        if not hasattr(owner, imported):
            importlib.import_module(f"{module}.{imported}")
        return
    package, *rest = path.split(".")
    owner = importlib.import_module(package)
    for name in rest:
        assert hasattr(owner, name), f"{path} is gone: no {name}"
        owner = getattr(owner, name)


def names_of_ours():
    """What our own code defines or assigns to itself."""
    found = {node.name for node in nodes(ast.FunctionDef | ast.ClassDef)}
    for node in nodes(ast.Attribute | ast.Name):
        if isinstance(node.ctx, ast.Store):
            found.add(getattr(node, "attr", None) or node.id)
    return found


def test_the_list_is_whole():
    """A private attribute that nothing of ours defines is a row above."""
    used = {node.attr for node in nodes(ast.Attribute)}
    for node in nodes(ast.Call):
        # getattr(x, "_name", None)
        if isinstance(node.func, ast.Name) and "attr" in node.func.id:
            used |= {
                x.value
                for x in node.args
                if isinstance(x, ast.Constant) and isinstance(x.value, str)
            }
    private = {
        name for name in used if name[:1] == "_" and name[:2] != "__"
    } - PUBLIC
    listed = {part.rpartition(".")[2] for part in PARTS}
    assert {"_flatten_layers", "_jax_state"} <= private
    assert private - names_of_ours() <= listed
