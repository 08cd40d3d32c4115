"""Fully sharded training on eight simulated devices.

    NPROC=16 XLA_FLAGS=--xla_force_host_platform_device_count=8 \
        python examples/eight_devices.py
"""

import os

os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported

import keras
import keras_hub
import numpy as np

import keras_dpo


def main():
    keras_dpo.distribution.set_mesh({"data": 4, "model": 2})
    policy = keras_hub.models.Llama3CausalLM(
        keras_hub.models.Llama3Backbone(
            vocabulary_size=512,
            num_layers=2,
            num_query_heads=4,
            num_key_value_heads=2,
            hidden_dim=64,
            intermediate_dim=128,
            tie_word_embeddings=True,
        ),
        preprocessor=None,
    )
    random = np.random.default_rng(0)
    pairs = [
        {
            "prompt_ids": random.integers(3, 512, 20).tolist(),
            "chosen_ids": random.integers(3, 256, 10).tolist(),
            "rejected_ids": random.integers(256, 512, 10).tolist(),
        }
        for _ in range(64)
    ]
    model = keras_dpo.DPOModel(policy)
    model.compile(keras.optimizers.AdamW(1e-3))
    model.fit(pairs, batch_size=16, epochs=2, verbose=2)


if __name__ == "__main__":
    main()
