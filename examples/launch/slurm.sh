#!/usr/bin/env bash
# Two nodes of eight GPUs: sbatch examples/launch/slurm.sh
# JAX gives every task the GPU of its SLURM_LOCALID: one task per GPU.
#SBATCH --job-name=keras-dpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
set -euo pipefail

srun --kill-on-bad-exit=1 keras-dpo train \
    --config "${CONFIG:-config.yaml}" \
    --distributed slurm \
    --mesh data=16 --shard_parameters false \
    --save_steps 200
