#!/bin/bash
# Train on several machines under SLURM; one task per machine starts one process per GPU:
#   CONFIG=fsdp2 sbatch --nodes 2 examples/accelerate/slurm.sh \
#       examples/finetune_classification.py --model my-longformer --data-file train.jsonl --resume
# With --resume a job that was stopped and started again goes on from its last whole checkpoint.
#SBATCH --job-name=long-documents
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
set -euo pipefail

CONFIG="examples/accelerate/${CONFIG:-ddp}.yaml"
MACHINES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MAIN_MACHINE=${MACHINES%%$'\n'*}
export CONFIG MAIN_MACHINE

# Every machine compiles the kernels once, before its processes need them.
srun adaptive-longformer build-kernels
srun bash -c 'exec accelerate launch --config_file "$CONFIG" \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_MACHINE" --main_process_port 29500 \
    "$@"' bash "$@"
