"""The same run on a Ray cluster: python examples/launch/ray_train.py

Ray's `JaxTrainer` has called `jax.distributed.initialize` when the function
runs, so `distributed` stays "none".
"""

import os

os.environ["KERAS_BACKEND"] = "jax"


def train_on_a_worker(settings):
    import keras_dpo

    keras_dpo.train(keras_dpo.DPOConfig(**settings))


def main():
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxTrainer

    settings = {
        "repo_id": "gemma3_instruct_270m",
        "dataset_name": "pairs.jsonl",
        "mesh": "data=16",
        "backup_every": "200",
        "save_directory": "/shared/out",
    }
    JaxTrainer(
        train_on_a_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=4,
            use_tpu=True,
            topology="4x4",
            accelerator_type="TPU-V6E",
        ),
        run_config=RunConfig(name="keras-dpo"),
    ).fit()


if __name__ == "__main__":
    main()
