#!/bin/bash
# {{ task.step }} of {{ task.work.run.root.name }}. Read it, change it, then submit it:
#   sbatch {{ task.file | string | shell }}
#SBATCH --job-name={{ task.name }}
#SBATCH --nodes={{ task.nodes }}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={{ cpus }}
{% if task.gpus %}
#SBATCH --gpus-per-node={{ task.gpus }}
{% endif %}
{% if job.partition %}
#SBATCH --partition={{ job.partition }}
{% endif %}
{% if job.time %}
#SBATCH --time={{ job.time }}
{% endif %}
{% for option in job.more %}
#SBATCH --{{ option }}
{% endfor %}
{% if jobs %}
#SBATCH --array=0-{{ jobs - 1 }}
{% endif %}
# A job that is queued again continues its log. Progress is written as plain lines.
#SBATCH --output={{ task.name }}-{{ "%A_%a" if jobs else "%j" }}.log
#SBATCH --open-mode=append
# SIGTERM comes before the end: the processes finish or drop what they are writing.
#SBATCH --signal=TERM@{{ warning }}
#SBATCH --requeue
set -euo pipefail
cd {{ folder | shell }}
export PATH={{ programs | shell }}:"$PATH" PYTHONUNBUFFERED=1
# On CPUs the number of threads decides how sums are rounded, so it is the same everywhere.
export OMP_NUM_THREADS={{ threads }}
{% if task.nodes > 1 %}
read -r HEAD < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
PORT=$((20000 + SLURM_JOB_ID % 20000))
export HEAD PORT
{% endif %}

command=({{ command | words }})
{% if students %}
students=({{ students | words }})
command+=(--student "${students[$SLURM_ARRAY_TASK_ID]}")
{% endif %}

# Runs on every node. torchrun passes SIGTERM on to its processes, and then ends with the status of
# an error: this shell answers 143 instead.
node() {
  child='' stopped=''
  trap 'stopped=yes; [ -z "$child" ] || kill -TERM "$child"' TERM
  {{ torchrun }} "$@" &
  child=$! status=0
  wait "$child" || status=$?
  if [ "$stopped" ]; then
    wait "$child" || true
    exit 143
  fi
  exit "$status"
}

status=0
# The nodes end at different times: none of them ends the others.
srun --wait=0 --kill-on-bad-exit=0 --cpus-per-task={{ cpus }} --unbuffered \
  bash -c "$(declare -f node); node \"\$@\"" node "${command[@]}" || status=$?

# Finished work is kept, so the same job continues where this one stopped.
if [ "$status" = 143 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt {{ job.requeues }} ]; then
  echo "out of time; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
