#!/usr/bin/env bash
# All stages of one experiment: ./reproduce.sh configs/toy.yaml [section.key=value ...]
#
# What is finished is skipped, what was interrupted continues. GPUS=8 ./reproduce.sh ... runs each
# stage under torchrun; PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")"
config=${1:?usage: ./reproduce.sh configs/NAME.yaml [section.key=value ...]}
shift
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
run() {
    local script=$1
    shift
    echo "== $script $*"
    if [ "${GPUS:-1}" -gt 1 ]; then
        "$python" -m torch.distributed.run --standalone --nproc_per_node="$GPUS" "$script" "$@"
    else
        "$python" "$script" "$@"
    fi
}
run evaluate.py --config "$config" --compare --check "$@"
run train_fr.py --config "$config" stage=teacher "$@"
run train_fr.py --config "$config" stage=judge "$@"
run train_mae.py --config "$config" --compare "$@"
run reconstruct.py --config "$config" --compare "$@"
run train_fr.py --config "$config" --compare "$@"
run evaluate.py --config "$config" --compare "$@"
