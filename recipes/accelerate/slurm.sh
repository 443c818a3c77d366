#!/usr/bin/env bash
# Many machines with SLURM, eight GPUs each: `sbatch "$(hfgpt recipes slurm)" mine.yaml`.
# Two minutes before the time is up SLURM sends TERM, which the launchers pass on: the run writes a checkpoint and ends,
# and the job puts itself back into the queue, to go on where it stopped. `output_dir` must be on a shared disk.
# Written without a cluster at hand: an example to adapt, not a job that was run.
# (A run without a launcher may be sent USR1 instead. torchrun, which accelerate uses, dies of USR1 itself.)
#SBATCH --job-name=hfgpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export first_node
# One launcher a node; `--machine_rank` differs, so it is read there. exec: the signal reaches the launcher itself.
srun bash -c 'exec accelerate launch --config_file "$(hfgpt recipes gpus)" \
    --num_machines "$SLURM_NNODES" --num_processes "$((8 * SLURM_NNODES))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$first_node" --main_process_port 29500 \
    -m hfgpt train "$0" --resume' "$1"
status=$?

# The launcher's exit code is not that of the run (75: stopped, and can go on), so the question is whether it is done.
output_dir=$(hfgpt config "$1" | sed -n 's/^output_dir: //p')
if [ "$status" -ne 0 ] && [ ! -f "$output_dir/results.json" ] && [ -d "$output_dir" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
