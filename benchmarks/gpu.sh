#!/usr/bin/env bash
# The tests and the check on a borrowed GPU, from an uninstalled checkout and without a network.
#
#   OUT=results bash benchmarks/gpu.sh          WHEELS=folder installs what is missing (pytest, hypothesis, typer, rich)
#
# Writes everything under $OUT, and says at the end what failed. Exit code 1 if anything did.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results/$(date +%Y%m%dT%H%M%S)}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
if [ -n "${WHEELS:-}" ]; then
  python3 -m pip install --quiet --no-index --find-links "$WHEELS" pytest hypothesis typer rich || exit 1
fi

failed=()
run() {
  local name=$1
  shift
  echo "== $name: $*"
  timeout 300 "$@" >"$out/$name.log" 2>&1 || failed+=("$name")
  tail -n 3 "$out/$name.log"
}

python3 - >"$out/machine.json" <<'EOF'
import json, platform, subprocess, torch, triton
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
print(json.dumps({"gpu": torch.cuda.get_device_name(), "python": platform.python_version(), "torch": torch.__version__,
                  "triton": triton.__version__, "commit": commit}))
EOF
cat "$out/machine.json"
parallel=$(python3 -c 'import xdist; print("-n 8 --dist loadgroup")' 2>/dev/null)
run check-quick python3 -m tritopt check --quick
run driver python3 -m pytest -q -x tests/test_driver.py
run optim python3 -m pytest -q $parallel tests/optim
run tests python3 -m pytest -q $parallel tests --ignore tests/optim --ignore tests/distributed --ignore tests/ecosystem \
  --ignore tests/test_quality.py --ignore tests/test_packaging.py --ignore tests/test_examples.py
# Processes of their own, on the CPU and in the interpreter.
run distributed env CUDA_VISIBLE_DEVICES= python3 -m pytest -q tests/distributed
timeout 300 python3 -m tritopt check --json >"$out/check.json" 2>"$out/check.log" || failed+=(check)

if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]} (logs in $out)"
  exit 1
fi
echo "all passed; logs in $out"
