#!/bin/bash
# Train a bundle on several machines of a SLURM cluster, one torchrun per machine. It resumes after the time limit.
#
#   sbatch examples/slurm.sh --dataset_dir /data/ACDC --labeled_patients 7
#
# Two minutes before the limit every process gets SIGTERM, saves and exits. The job is queued again and resumes with the
# same weights. An error ends the job. `output_dir` must be on a file system that all machines share.
#SBATCH --job-name=knowsam
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -u
bundle=${BUNDLE:-bundles/knowsam_acdc}
methods=${METHODS:-}  # overlays, as in METHODS="network_plain.json mean_teacher.json"
port=${PORT:-29500}

configs="'$bundle/configs/train.json'"
for name in $methods; do configs+=",'$bundle/configs/$name'"; done
configs+=",'$bundle/configs/multi_gpu_train.json'"

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110  # seconds to save in; torchrun's own are 30
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))

stopped=
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$head_node:$port" \
    -m monai.bundle run --config_file "[$configs]" "$@" &
step=$!
trap 'stopped=yes; kill -TERM $step' TERM
wait $step
code=$?
if [ -n "$stopped" ]; then
    wait $step  # the first wait ended with the signal
    echo "The time limit is near: the run is saved and queued again."
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit $code
