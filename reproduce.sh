#!/usr/bin/env bash
# All stages of one experiment: ./reproduce.sh configs/toy.yaml [section.key=value ...]
#
# First the whole experiment is checked, in seconds. What is finished is skipped, a training that
# was interrupted continues. GPUS=8 ./reproduce.sh ... runs each stage under torchrun; PYTHON names
# the interpreter.
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi
set -euo pipefail
cd "$(dirname "$0")"
if [ $# -eq 0 ]; then
    echo "usage: ./reproduce.sh configs/NAME.yaml [section.key=value ...]" >&2
    exit 2
fi
[ "$1" = --config ] && shift
config=$1
shift
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
stage=0
run() {
    local script=$1
    shift
    stage=$((stage + 1))
    export STAGE="stage $stage of 6:"
    if [ "${GPUS:-1}" -gt 1 ]; then
        "$python" -m torch.distributed.run --standalone --nproc_per_node="$GPUS" "$script" "$@"
    else
        "$python" "$script" "$@"
    fi
}
"$python" evaluate.py "$config" --compare --check "$@"
run train_fr.py "$config" stage=teacher "$@"
run train_fr.py "$config" stage=judge "$@"
run train_mae.py "$config" --compare "$@"
run reconstruct.py "$config" --compare "$@"
run train_fr.py "$config" --compare "$@"
run evaluate.py "$config" --compare "$@"
