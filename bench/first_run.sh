#!/usr/bin/env bash
# A new GPU, twice ten minutes, without a network:
#
#     bench/first_run.sh FOLDER            is everything right on it, and what can it do at best?
#     bench/first_run.sh FOLDER measure    how fast: the first points of the benchmark's plan
#
# Every step has its own time limit and leaves its output in files, so a step that fails or is cut
# short costs nothing but itself. Needs python3 with torch, triton, pytest (and pytest-xdist, to
# compile kernels in parallel). FUSEDRNN_COMMIT names the commit where there is no git.
set -uo pipefail

out=${1:?usage: bench/first_run.sh FOLDER [measure]}
what=${2:-verify}
python=${PYTHON:-python3}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
failed=0

step() { # name, seconds, command
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout --signal=INT --kill-after=10 "$limit" "$@" > "$out/$name.txt" 2>&1
  status=$?
  [[ $status -eq 0 ]] || failed=1
  echo "$name: exit status $status after $((SECONDS - start)) s, see $out/$name.txt"
  tail -n 3 "$out/$name.txt" | sed 's/^/    /'
}

"$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" ||
  { echo "$python sees no CUDA device: there is nothing to verify here" >&2; exit 1; }
"$python" -c "import fusedrnn.kernels" 2> /dev/null ||
  step install 40 "$python" -m pip install --no-build-isolation --no-deps -e .
if [[ $what == measure ]]; then
  began=$SECONDS
  step bench 560 "$python" -m bench.run --device cuda --budget 530 --out "$out/bench.json"
  # Exit status 3: a kernel left the device unusable for that process. A new one goes on after it.
  left=$((530 - SECONDS + began))
  if [[ $status -eq 3 && $left -gt 60 ]]; then
    step bench-resumed "$((left + 20))" "$python" -m bench.run --device cuda --budget "$left" \
      --resume "$out/bench.json" --out "$out/bench.json"
  fi
  exit $failed
fi

# Most of the time goes into compiling; a core is left for the one process that launches.
workers=()
"$python" -c "import xdist" 2> /dev/null && workers=(-n "$(($(nproc) > 16 ? 16 : $(nproc) > 2 ? $(nproc) - 1 : 2))")

step device 10 nvidia-smi
step selfcheck 40 "$python" -m fusedrnn --json
step layers 210 "$python" -m pytest -q -m gpu ${workers[@]+"${workers[@]}"} \
  tests/gpu/test_exchange_on_device.py tests/gpu/test_plans_on_device.py \
  tests/gpu/test_layers_on_device.py tests/gpu/test_beyond_on_device.py
step launches 80 "$python" -m pytest -q -m gpu -k "not sanitizer" tests/gpu/test_launches.py
# Both write one results file: under bench/results/<gpu>/ the meter and the report find it.
step limits 60 "$python" -m bench.floor --out "$out/limits.json"
step calibrate 90 "$python" -m bench.floor --out "$out/limits.json" --calibrate 75
step sanitizers 60 "$python" -m pytest -q -m gpu -k sanitizer tests/gpu/test_launches.py
exit $failed
