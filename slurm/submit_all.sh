#!/usr/bin/env bash
# The whole pipeline as SLURM jobs that wait for one another, from the checkout:
#
#   slurm/submit_all.sh configs/celeba64 runs/celeba64 --source celeba --root ~/celeba
#   BASELINES="ae vae wae" slurm/submit_all.sh ...      also the baselines, as an array, and the comparison
#
# What follows the two directories goes to pipeline/run_all.py, which knows the stages. slurm/env.sh
# has the options of the jobs. Called again, it submits all again: a stage that is done ends at once.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { sed -n '2,/^set/{/^#/p}' "$0" >&2; exit 2; }
configs=$1 out=$2
shift 2
# shellcheck source=slurm/env.sh
source slurm/env.sh
read -ra many <<< "$MANY"
read -ra one <<< "$ONE"
mkdir -p "$out/logs"

submit() {  # name, jobs to wait for (a:b:c) or -, then options and the script; prints the job's number
    local name=$1 after=$2
    shift 2
    local options=(--parsable --job-name="$name" --output="$out/logs/$name-%j.log")
    [ "$after" = - ] || options+=(--dependency="$after" --kill-on-invalid-dep=yes)
    sbatch "${options[@]}" "$@"
}

plan=$("$PYTHON" pipeline/run_all.py --configs "$configs" --out "$out" --dry_run true "$@")
declare -A jobs
while IFS=$'\t' read -r name after processes arguments; do
    waits=-
    if [ "$after" != - ]; then
        waits=afterok
        for stage in ${after//,/ }; do waits+=:${jobs[$stage]}; done
    fi
    options=("${one[@]}")
    [ "$processes" = one ] || options=("${many[@]}")
    IFS=$'\t' read -ra stage <<< "$arguments"
    jobs[$name]=$(submit "$name" "$waits" "${options[@]}" slurm/run.sbatch "${stage[@]}")
    echo "${jobs[$name]}  $name"
done <<< "$plan"

if [ -n "${BASELINES:-}" ]; then
    export WORDS=$BASELINES
    read -ra words <<< "$WORDS"
    tasks=(--array="0-$((${#words[@]} - 1))")
    trained=$(submit baselines "afterok:${jobs[shards]}" "${many[@]}" "${tasks[@]}" slurm/run.sbatch \
        pipeline/train_vae.py --config "$configs/train_vae_{}.yaml" --data "$out/shards" --out "$out/{}")
    reported=$(submit reports "aftercorr:$trained" "${one[@]}" "${tasks[@]}" slurm/run.sbatch \
        pipeline/report_vae.py --data "$out/shards" --checkpoint "$out/{}" --out "$out/{}/report")
    runs=("${words[@]/#/--runs+=$out/}")
    compared=$(submit comparison "afterok:$reported:${jobs[judge]}:${jobs[evaluation]}" "${one[@]}" slurm/run.sbatch \
        pipeline/compare.py --data "$out/shards" --judge "$out/classifier-judge" \
        "${runs[@]}" "--runs+=$out/vqvae" --out "$out/comparison")
    echo "$trained  baselines ($WORDS), reports $reported, comparison $compared"
fi
