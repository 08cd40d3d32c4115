#!/usr/bin/env bash
# Two nodes of eight GPUs: sbatch examples/launch/slurm.sh
# JAX gives every task the GPU of its SLURM_LOCALID: one task per GPU.
#SBATCH --job-name=keras-dpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
set -uo pipefail

srun keras-dpo train \
    --config "${CONFIG:-config.yaml}" \
    --distributed slurm \
    --mesh data=16 \
    --backup_every 200
status=$?
# Out of time or preempted: the next turn goes on from the backup.
if [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
