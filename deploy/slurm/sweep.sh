#!/usr/bin/env bash
# The sweep lenet5-mini-conv1 on SLURM: a Ray cluster on the job's nodes, which goes with the job. `sbatch FILE` again goes
# on from the store. Partition, account, time and sizes are your site's: edit them.
#SBATCH --job-name=lenet5-mini-conv1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --time=24:00:00
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
# Three minutes before the end the sweep is asked to stop, which takes at most one minibatch and a checkpoint; then the
# job is queued again, and goes on.
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
# shellcheck disable=SC2016,SC2089,SC2090 # what is quoted is as it was given, or for an inner shell
set -euo pipefail
again=no
trap 'again=yes' USR1

export PATH=/shared/prunesweep/.venv/bin:"$PATH"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# Nodes of a busy cluster come up one after the other.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600
store=/shared/results
data_root=/shared/data

# ~/.ray/auth_token, which all nodes see as they see the home folder; the token is made once.
ray get-auth-token --generate >/dev/null
chmod 600 ~/.ray/auth_token

spec="$(mktemp)"
ended="$(mktemp)"
trap 'rm -f "$spec" "$ended"' EXIT
cat >"$spec" <<'END_OF_SPEC'
# arXiv 2412.00143: every way to remove filters of conv1 of LeNet5-Mini on MNIST, at seven ratios.
name: lenet5-mini-conv1
grid:
  model: lenet5_mini
  dataset: mnist
  layers: conv1
  ratio: [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
  pruner: oracle
  seed: [0, 1, 2]
candidates: {mode: all}
dense: {epochs: 30, batch_size: 256, optimizer: sgd, momentum: 0.9, lr: {0: 0.01, 20: 0.001}, weight_decay: 1.0e-4, seed: 0}
retrain: {epochs: 30, batch_size: 256, optimizer: sgd, momentum: 0.9, lr: {0: 0.001, 20: 0.0001}, weight_decay: 1.0e-4}
END_OF_SPEC

# This script runs on the first node, and so do Ray's head and the driver.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${hosts[0]}"
export head spec ended store data_root
# shellcheck disable=SC2329 # srun calls it
on_each_node() {
  ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" -- \
    bash -c 'code=0; "$@" || code=$?; echo "$code" >"$0"' "$ended" \
    prunesweep run "$spec" --address "$head:6379" --store "$store" --data-root "$data_root" || true
  if [ "$SLURM_NODEID" = 0 ] && [ ! -s "$ended" ]; then
    echo 4 >"$ended" # Ray did not start
  fi
}
export -f on_each_node
# The others notice late that the head has gone: this script ends with the driver, and what is left of the job with it.
# A node that is lost on the way costs what it was at, not the job.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  --wait=0 --kill-on-bad-exit=0 bash -c on_each_node &
nodes=$!

asked=no
while [ ! -s "$ended" ] && kill -0 "$nodes" 2>/dev/null; do
  # A driver that is only starting has not heard: it is asked again. Not on another cluster, which the environment or
  # prunesweep.toml may name.
  if [ "$again" = yes ] && [ "$asked" = no ] && prunesweep stop lenet5-mini-conv1 --store "$store" --address "" 2>/dev/null; then
    asked=yes
  fi
  sleep 2 &
  wait $! || true # which a signal ends
done
code="$(cat "$ended")"
code="${code:-1}"
if [ "$again" = yes ] && [ "$code" -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
