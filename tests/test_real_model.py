"""SmolLM2-135M on real records: a short version of docs/real_run.md."""

import json
import os

import keras
import numpy as np
import pytest
from conftest import PAIRS

import keras_dpo
from keras_dpo import DPOConfig

LN2 = float(np.log(2))


# By hand: KERAS_DPO_LORA=1, the same with adapters.
RANKS = [8, 0] if os.environ.get("KERAS_DPO_LORA") else [0]


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", RANKS)
def test_a_few_steps_on_real_pairs(lora_rank, smollm2, tmp_path):
    """Starts at ln 2, lowers the loss on what it sees, leaves a preset that
    Keras-Hub loads and that answers."""
    import keras_hub

    done = keras_dpo.train(
        DPOConfig(
            model_name="short",
            repo_id=str(smollm2),
            dataset_name=str(PAIRS),
            # A few pairs, seen again: what is measured is the mechanics.
            dataset_split="train[:4]",
            lora_rank=lora_rank,
            learning_rate=1e-3 if lora_rank else 2e-5,
            learning_rate_schedule="constant",
            max_length=64,
            max_prompt_length=32,
            total_batch_size=2,
            num_train_epochs=3,
            log_steps=1,
            num_sample_prompts=0,
            save_directory=str(tmp_path),
        )
    )
    path = done.directory / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [r for r in records if "end_of_epoch" not in r]
    assert steps[0]["loss"] == pytest.approx(LN2, abs=2e-4)
    assert abs(steps[0]["chosen_reward"]) < 1e-3
    history = done.history
    assert history["loss"][-1] < LN2 - 0.05
    assert history["reward_accuracy"][-1] == 1.0
    policy = keras_hub.models.CausalLM.from_preset(
        str(done.directory / "policy")
    )
    tuned = keras_dpo.load_policy(str(done.directory / "policy"))
    preprocessor = keras_dpo.DPOPreprocessor.from_policy(tuned)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = np.array([preprocessor.prompt_ids(question)])
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    np.testing.assert_allclose(policy(inputs), tuned(inputs), atol=1e-4)
    # A preset has a tokenizer, a layer that Keras takes for not built.
    limits = keras_dpo.DPOPreprocessor.from_policy(
        tuned, max_length=64, max_prompt_length=32
    )
    model = keras_dpo.DPOModel(tuned, preprocessor=limits)
    model.compile()
    rows = keras_dpo.data.read_rows(PAIRS, "train[:2]")
    scores = model.predict(rows, batch_size=2, verbose=0)
    assert np.isfinite(scores["chosen_log_prob"]).all()
    assert scores["reward_margin"].tolist() == [0.0, 0.0]
    answer = keras_dpo.generate(tuned, preprocessor, [question], 8)[0]
    assert len(answer) > 3
    keras.utils.clear_session()
