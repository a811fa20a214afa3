# shellcheck shell=bash
# What differs from cluster to cluster: edit this file. run.sbatch and submit_all.sh read it, in the
# checkout; what is set already stays.

# module load cuda
export PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# A file of configs/accelerate: precision, DDP or ZeRO. Counts of machines and processes come from the job.
export LAUNCH_CONFIG=${LAUNCH_CONFIG:-configs/accelerate/gpu.yaml}
export PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Options of sbatch, for the stages that train on many processes and for those of one.
MANY=${MANY:---nodes=1 --gpus-per-node=8 --cpus-per-task=64 --time=12:00:00}
ONE=${ONE:---nodes=1 --gpus-per-node=1 --cpus-per-task=16 --time=12:00:00}
