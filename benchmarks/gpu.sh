#!/usr/bin/env bash
# Everything that needs a GPU, on any machine that has one: at most six minutes.
#
#   benchmarks/gpu.sh [FOLDER]       # by default build/gpu; PYTHON=... chooses the interpreter
#
# Needs an NVIDIA GPU and, for that Python, torch >= 2.6, pytest, matplotlib, scikit-learn, psutil
# and cloudpickle. It needs no Jupyter, no network, and heeds neither the project's pytest settings
# nor its conftest. FOLDER gets a log of each part, the appendix with its outputs, and its pictures.
# Without a GPU it still runs: what needs one is skipped, and says so.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-build/gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" MPLBACKEND=agg DDP_LESSONS_LIVE=0
failed=()

part() { # part NAME SECONDS COMMAND...: run it, show and keep what it prints
  local name=$1 seconds=$2 began=$SECONDS code
  shift 2
  echo "== $name"
  timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  echo "== $name: exit code $code after $((SECONDS - began)) s (limit $seconds s)"
  ((code == 0)) || failed+=("$name")
}

part machine 60 "$python" -m benchmarks.gpu_machine
part tests 170 "$python" -m pytest -c /dev/null --rootdir="$PWD" --noconftest -p no:cacheprovider \
  -W ignore::pytest.PytestUnknownMarkWarning -o faulthandler_timeout=90 -ra -q --durations=10 tests/end_to_end/test_gpu.py
part notebook 80 "$python" -m benchmarks.run_notebook notebooks/gpu.ipynb "$out"
part recording 50 "$python" -m benchmarks.recording --backend nccl --rounds 5

if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all parts passed"
