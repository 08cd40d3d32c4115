"""LoRA on a real model, with a moving reference and samples on the way.

python examples/lora_with_sync.py MODEL_DIRECTORY PAIRS.jsonl
"""

import os
import sys

os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported

import keras

import keras_dpo


def main(directory, pairs):
    policy = keras_dpo.load_policy(directory)
    policy.backbone.enable_lora(rank=16)
    preprocessor = keras_dpo.DPOPreprocessor.from_policy(
        policy, max_length=256, max_prompt_length=128
    )
    train, valid = (
        keras_dpo.PreferenceDataset(
            pairs, preprocessor, batch_size=4, split=split
        )
        for split in ("train[:90%]", "train[90%:]")
    )
    prompts = [record["prompt"] for record in valid.records[:2]]
    model = keras_dpo.DPOModel(policy, preprocessor=preprocessor)
    model.compile(optimizer=keras.optimizers.AdamW(1e-4), loss="sigmoid")
    model.fit(
        train,
        validation_data=valid,
        epochs=1,
        callbacks=[
            keras_dpo.callbacks.ReferenceSync(every=32, alpha=0.6),
            keras_dpo.callbacks.GenerationSamples(prompts, every=32),
        ],
    )
    keras_dpo.save_policy(policy, "tuned", preprocessor)


if __name__ == "__main__":
    main(*sys.argv[1:])
