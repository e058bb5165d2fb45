#!/usr/bin/env bash
# Builds, checks and times the CUDA kernels on the machine's GPU in under ten minutes.
#
# benchmarks/gpu.sh [check] [sanitize] [time], without arguments all three. A step that fails or hangs costs its own
# time only; a family of kernels that fails its checks is not timed. Results and the log go to $OUT, by default to
# benchmarks/results.
#   PYTHON    interpreter with torch, setuptools>=77, pybind11, ninja, pytest, matplotlib, rich, tyro; default python3
#   WHEELS    folder of wheels to install first, for a machine without a network: tyro docstring_parser typeguard, and
#             the peers that are to take part: pytorch-metric-learning cut-cross-entropy liger-kernel
#   FAMILIES  which families of kernels, such as "sm80 sm90"; default all that the GPU runs, the simplest first
#   LIMIT     seconds for everything; default 570
#   TRAP      polls of a barrier after which the first build's kernels trap; default 10000000, over 0.1 s
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1

python=${PYTHON:-python3} parts=" ${*:-check sanitize time} " limit=${LIMIT:-570} out=${OUT:-benchmarks/results}
summary=() families=() passed=() alive=() # families: all, those that are right, and those that do not hang

wanted() { [[ $parts == *" $1 "* ]]; }
hung() { (($1 == 124 || $1 == 137)); }

# step NAME SECONDS COMMAND...: runs it for at most that long, and no longer than the whole may take.
step() {
    local name=$1 budget=$2 left=$((limit - SECONDS)) begin=$SECONDS rc=0 state=passed
    shift 2
    ((budget < left)) || budget=$left
    if ((budget < 10)); then
        summary+=("$(printf '%-10s %4s   %s' 'NOT RUN' - "$name: no time left")")
        return 1
    fi
    printf '\n=== %s (at most %ss): %.200s\n' "$name" "$budget" "${*//$'\n'/ }"
    timeout -k 10 "$budget" "$@" || rc=$?
    ((rc == 0)) || state="FAILED $rc"
    ! hung $rc || state="TIMED OUT"
    summary+=("$(printf '%-10s %4ss  %s' "$state" $((SECONDS - begin)) "$name")")
    echo "=== $name: $state"
    return $rc
}

under=() marked=cuda # what runs the tests, and which
tests() { # NAME SECONDS PYTEST-ARGUMENT...
    step "$1" "$2" "${under[@]}" "$python" -m pytest tests/test_cuda.py -m "$marked" -rfE --tb=short --maxfail=30 \
        -o faulthandler_timeout=30 "${@:3}"
}

# In place, because tests and benchmarks run from this tree and would not find a package installed elsewhere.
# Where the kernels are not in it all tests would be skipped, and pass.
build() { # NAME
    step "$1" 120 "$python" -m pip install -q --no-build-isolation --no-deps -e . || return
    local found ask="from benchmarks import kernels as k; assert not k.missing('cuda'), k.missing('cuda')"
    if ! found=$("$python" -c "$ask; print(*reversed(k.available_families()))"); then
        summary+=("$(printf '%-10s %4s   %s' 'FAILED' - "$1: no CUDA kernels in it")")
        return 1
    fi
    read -ra families <<<"${FAMILIES:-$found}"
    echo "=== families: ${families[*]}"
}

describe='
import importlib.util, platform
from importlib.metadata import version
import torch
print("python", platform.python_version(), "torch", torch.__version__, "setuptools", version("setuptools"))
needed = ["tyro", "rich", "matplotlib", "pytest", "pybind11", "ninja"]
peers = ["pytorch_metric_learning", "cut_cross_entropy", "liger_kernel", "triton"]
for kind, names in {"MISSING": needed, "peers that do not take part": peers}.items():
    print(f"{kind}:", ", ".join(name for name in names if not importlib.util.find_spec(name)) or "none")
assert torch.cuda.is_available(), "torch finds no GPU"
'

# The products, then what is made of them, smallest shapes first. In a build in which a barrier that is waited for
# too long traps: that ends one launch, where a hang would hold the device.
check() {
    local family first second
    NVCC_APPEND_FLAGS=-DFM_TRAP_AFTER=${TRAP:-10000000} build "build that traps where it would hang" || return
    for family in "${families[@]}"; do
        first=0 second=0
        tests "$family: exact products" 45 -v -k "$family and integers" || first=$?
        hung $first || tests "$family: exponent sum, nearest class, gradients" 60 -v \
            -k "$family and (exponent_sum or nearest or ties or losses)" || second=$?
        hung $first || hung $second || alive+=("$family")
        ((first || second)) || passed+=("$family")
    done
    build "build" || return
    tests "portable: all tests" 90 -q -k "not sm80 and not sm90" --durations=5
    local candidates=("${passed[@]}")
    passed=()
    for family in "${candidates[@]}"; do
        tests "$family: all tests" 90 -q -k "$family" --durations=5 && passed+=("$family")
    done
}

# Without torch's caching, so that every tensor has bounds of its own.
sanitize() {
    local tool family under marked="cuda and sanitizer"
    for tool in memcheck racecheck synccheck; do
        under=(compute-sanitizer --tool "$tool" --launch-timeout=0 --target-processes=all --report-api-errors=no
            --error-exitcode=99)
        for family in "${alive[@]}"; do
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 tests "$tool, $family" 60 -q -x -k "$family"
        done
    done
}

measure() { # FAMILY...
    step "benchmarks: ${*:-portable}" 300 "$python" -m benchmarks kernels --device cuda --rounds 9 --families "$@" \
        --output "$out/$gpu.json"
}

main() {
    nvidia-smi
    nvcc --version | tail -2
    [[ -z ${WHEELS:-} ]] || step "wheels" 60 "$python" -m pip install -q --no-index --no-deps "$WHEELS"/*.whl
    step "machine" 60 "$python" -c "$describe" || return
    if wanted check; then
        check
    else
        build "build"
        alive=("${families[@]}") passed=("${families[@]}") # by an earlier run; answers are still checked before times
    fi
    if wanted sanitize; then
        ! wanted time || limit=$((limit - 200)) # kept for the times
        sanitize
        ! wanted time || limit=$((limit + 200))
    fi
    ! wanted time || measure "${passed[@]}"
    printf '\n=== summary, %ss\n' "$SECONDS"
    printf '%s\n' "${summary[@]}"
    [[ "${summary[*]}" != *FAILED* && "${summary[*]}" != *"TIMED OUT"* && "${summary[*]}" != *"NOT RUN"* ]]
}

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr '[:upper:] ' '[:lower:]-')
gpu=${gpu:-no-gpu}
mkdir -p "$out"
main 2>&1 | tee "$out/$gpu.log"
exit "${PIPESTATUS[0]}"
