#!/usr/bin/env bash
# Two nodes of eight GPUs: sbatch examples/launch/slurm.sh
# JAX gives every task the GPU of its SLURM_LOCALID: one task per GPU.
#SBATCH --job-name=keras-dpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
# SIGTERM two minutes before the end: every process saves, and exits with 75.
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

srun --kill-on-bad-exit=1 keras-dpo train \
    --config "${CONFIG:-config.yaml}" \
    --distributed slurm \
    --mesh data=16 \
    --backup_every 200 \
    --resume auto || status=$?

# 75: preempted, the backup is whole. The same command goes on from it.
if [ "${status:-0}" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "${status:-0}"
