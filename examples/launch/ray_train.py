"""The same run on a Ray cluster: python examples/launch/ray_train.py

Ray's `JaxTrainer` has called `jax.distributed.initialize` when the function
runs, so `distributed` stays "none". To try it on two CPU processes of this
machine, with any preset and pairs:

    python examples/launch/ray_train.py --local path/to/preset pairs.jsonl
"""

import argparse
import os
import pathlib

os.environ["KERAS_BACKEND"] = "jax"


def train_on_a_worker(settings):
    import keras_dpo

    keras_dpo.train(keras_dpo.DPOConfig(**settings))


def main():
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxConfig, JaxTrainer

    parser = argparse.ArgumentParser()
    parser.add_argument("--local", nargs=2, metavar=("PRESET", "PAIRS"))
    local = parser.parse_args().local
    settings = {
        "repo_id": "gemma3_instruct_270m",
        "dataset_name": "pairs.jsonl",
        "mesh": "data=16",
        "backup_every": "200",
        "save_directory": "/shared/out",
    }
    scaling = ScalingConfig(
        num_workers=4,
        use_tpu=True,
        topology="4x4",
        accelerator_type="TPU-V6E",
    )
    if local:
        # Workers run elsewhere: absolute paths.
        preset, pairs, out = (
            str(pathlib.Path(path).absolute()) for path in (*local, "ray_out")
        )
        settings |= {
            "repo_id": preset,
            "dataset_name": pairs,
            "mesh": "data=2",
            "save_directory": out,
            "max_steps": 10,
        }
        scaling = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1})
        environment = {"JAX_PLATFORMS": "cpu", "NPROC": "16"}
        ray.init(num_cpus=2, runtime_env={"env_vars": environment})
    JaxTrainer(
        train_on_a_worker,
        train_loop_config=settings,
        # Ray begins JAX' processes for a TPU or GPU; JAX_PLATFORMS wins.
        jax_config=JaxConfig(use_tpu=True),
        scaling_config=scaling,
        run_config=RunConfig(name="keras-dpo"),
    ).fit()


if __name__ == "__main__":
    main()
