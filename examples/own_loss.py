"""A loss of one's own, on the demo's tiny model; runs offline in a minute.

python examples/own_loss.py
"""

import os

os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported

import keras

import keras_dpo
from keras_dpo.runs import demo


@keras.saving.register_keras_serializable(package="examples")
class SquaredHinge(keras_dpo.losses.PreferenceLoss):
    """max(0, 1 - beta d)^2."""

    def formula(self, policy, reference):
        rewards = self.rewards(policy, reference)
        slack = 1.0 - (rewards[:, 0] - rewards[:, 1])
        return keras.ops.square(keras.ops.relu(slack))


def main():
    keras.utils.set_random_seed(0)
    training, held_out = demo.make_questions(seed=0)
    questions = [*training, *held_out]
    tokenizer = demo.make_tokenizer(questions)
    policy = demo.make_undecided_policy(questions, tokenizer, epochs=80)
    preprocessor = keras_dpo.DPOPreprocessor(tokenizer, 64, 32)
    pairs, valid = (
        [
            {"prompt": q.prompt, "chosen": q.right, "rejected": q.wrong}
            for q in part
        ]
        for part in (training, held_out)
    )
    model = keras_dpo.DPOModel(policy, preprocessor=preprocessor)
    model.compile(
        optimizer=keras.optimizers.AdamW(1e-3, weight_decay=0.0),
        loss={SquaredHinge(beta=0.3): 1.0, "sft": 0.3},
    )
    model.fit(pairs, validation_data=valid, epochs=6)
    right = demo.count_right(policy, preprocessor, held_out)
    print(f"Held-out questions answered rightly: {right} of {len(held_out)}")


if __name__ == "__main__":
    main()
