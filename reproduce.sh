#!/usr/bin/env bash
# All stages of one experiment: ./reproduce.sh configs/toy.yaml [section.key=value ...]
#
# First the whole experiment is checked, in seconds. What is finished is skipped, a training that
# was interrupted continues. GPUS=8 ./reproduce.sh ... runs each stage under torchrun; PYTHON names
# the interpreter.
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi
set -euo pipefail
kit=$(cd "$(dirname "$0")" > /dev/null && pwd)
if [ $# -eq 0 ]; then
    echo "usage: ./reproduce.sh configs/NAME.yaml [section.key=value ...]" >&2
    exit 2
fi
[ "$1" = --config ] && shift
config=$1
shift
# Paths are relative to the caller's folder; a config that is not there may be one of the kit's
if [ ! -e "$config" ] && [ -e "$kit/$config" ]; then config=$kit/$config; fi
python=${PYTHON:-$([ -x "$kit/.venv/bin/python" ] && echo "$kit/.venv/bin/python" || echo python)}
stage=0
run() {
    local script=$kit/$1
    shift
    stage=$((stage + 1))
    export STAGE="$stage/6"
    if [ "${GPUS:-1}" -gt 1 ]; then
        "$python" -m torch.distributed.run --standalone --nproc_per_node="$GPUS" "$script" "$@"
    else
        "$python" "$script" "$@"
    fi
}
"$python" "$kit/evaluate.py" "$config" --compare --check "$@"
run train_fr.py "$config" stage=teacher "$@"
run train_fr.py "$config" stage=judge "$@"
run train_mae.py "$config" --compare "$@"
run reconstruct.py "$config" --compare "$@"
run train_fr.py "$config" --compare "$@"
run evaluate.py "$config" --compare "$@"
