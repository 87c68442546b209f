#!/usr/bin/env bash
# Bench, check, tests and a tensor of more than 2^31 elements on a borrowed GPU: within ten minutes, from an uninstalled
# checkout, without a network.
#
#   OUT=results bash benchmarks/gpu.sh
#
# Writes eight files under $OUT, and says at the end what failed. Exit code 1 if anything did, 2 if nothing could run.
#
#   WHEELS=folder   installs what is missing, and the bench's peers, from there into a folder of its own
#   PYTHON=python   another interpreter than python3
#   REHEARSE=1      no GPU: goes through every part with small selections, kernels in Triton's interpreter
#   PLAN=1          says only what would run, and the seconds that each part may take
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results/$(date +%Y%m%dT%H%M%S)}
rehearse=${REHEARSE:-}
plan=${PLAN:-}

has() { "$python" -c "import $1" >/dev/null 2>&1; }
say() { echo "$*" | tee -a "$out/summary.txt"; }

if [ -z "$plan" ]; then
  mkdir -p "$out" || exit 2
  : >"$out/summary.txt"
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
if [ -n "$rehearse" ]; then
  export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
else
  unset TRITON_INTERPRET
fi

failed=()
verdict() {  # NAME EXIT_CODE SECONDS_ALLOWED
  case $2 in
    0) say "$1: passed" ;;
    124 | 137) failed+=("$1"); say "$1: STOPPED after $3 s" ;;
    *) failed+=("$1"); say "$1: FAILED with exit code $2" ;;
  esac
}
# NAME SECONDS LOG COMMAND...: one part, alone.
part() {
  local name=$1 seconds=$2 log=$3
  shift 3
  if [ -n "$plan" ]; then
    printf '%-12s %4s s  %s\n' "$name" "$seconds" "$*"
    return
  fi
  echo "== $name: $*" >>"$out/$log"
  # An interrupted pytest still says what failed; whoever started this may have it ignored.
  timeout -s INT -k 5 "$seconds" env --default-signal=INT "$@" >>"$out/$log" 2>&1
  verdict "$name" $? "$seconds"
}
# NAME SECONDS COMMAND...: one part that runs beside others; `join` waits for it.
beside() {
  local name=$1 seconds=$2
  shift 2
  if [ -n "$plan" ]; then
    printf '%-12s %4s s, beside the tests  %s\n' "$name" "$seconds" "$*"
    return
  fi
  (
    timeout -k 5 "$seconds" "$@" >"$work/$name.log" 2>&1
    echo $? >"$work/$name.code"
  ) &
}
join() {  # NAME SECONDS
  [ -n "$plan" ] && return
  { echo "== $1"; cat "$work/$1.log"; } >>"$out/tests.log"
  verdict "$1" "$(cat "$work/$1.code")" "$2"
}

# What is missing comes from the wheels, never torch itself or what it is built on.
install() {
  local wheels=() wheel
  for wheel in "$WHEELS"/*.whl; do
    case ${wheel##*/} in
      torch-* | triton-* | numpy-* | nvidia_* | cuda_*) ;;
      *) [ -f "$wheel" ] && wheels+=("$wheel") ;;
    esac
  done
  [ ${#wheels[@]} -gt 0 ] || { echo "no wheels to install in $WHEELS"; return 1; }
  local pip=("$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$work/site")
  "${pip[@]}" "${wheels[@]}" && return
  # One that is not for this machine must not keep the others out.
  local code=0
  for wheel in "${wheels[@]}"; do "${pip[@]}" "$wheel" || code=1; done
  return $code
}
if [ -n "${WHEELS:-}" ]; then
  if [ -n "$plan" ]; then
    printf '%-12s %4s s  pip install %s\n' install 40 "$WHEELS/*.whl"
  else
    export -f install
    export python work WHEELS
    part install 40 summary.txt bash -c install
    PYTHONPATH=$PYTHONPATH:$work/site
  fi
fi

if [ -z "$plan" ]; then
  if [ -z "$rehearse" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    say "no GPU that torch can use; REHEARSE=1 goes through all of this without one"
    exit 2
  fi
  [ -n "$rehearse" ] && say "A REHEARSAL without a GPU: small selections, and no time means anything"
  "$python" - <<'END' 2>&1 | tee -a "$out/summary.txt"
import platform
import torch
import triton
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"{gpu}, Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}")
END
  say "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)"
  # The command line without typer and rich: the same functions, and JSON only.
  cat >"$work/bare.py" <<'END'
import dataclasses
import json
import sys
from pathlib import Path

from tritopt.tools import check
from tritopt.tools.bench import host, plan, plot, run

command, *rest = sys.argv[1:]
options = dict(zip(rest[::2], rest[1::2]))
if command == "check":
    rows = list(check.run_checks(check.registered([options["--optimizer"]]), quick=True))
    print(json.dumps({**check.environment(), "rows": [dataclasses.asdict(row) for row in rows]}))
    sys.exit(not all(row.passed for row in rows))
if command == "host":
    Path(options["--save"]).write_text(json.dumps(host.document(host.host_times(
        rounds=int(options["--rounds"]), chosen_peers=["torch fused", "torch foreach"]
    ))))
if command == "bench":
    shapes = [options["--shapes"]] if "--shapes" in options else None
    items = plan.plan(shapes, chosen_peers=[options["--peer"]] if "--peer" in options else None)
    bench = run.Bench(run.find_device("--rehearse" in options), items, float(options["--seconds"]))
    for _ in bench.rows():
        bench.save(Path(options["--save"]))
    bench.save(Path(options["--save"]))
    sys.exit(not bench.passed)
END
fi

pytest=("$python" -m pytest -q -p no:cacheprovider --continue-on-collection-errors --tb=short)
parallel=()
has xdist && parallel=(-n "${WORKERS:-$(($(nproc) / 2 > 1 ? $(nproc) / 2 : 1))}" --dist loadgroup)
if has typer && has rich; then
  tritopt=("$python" -m tritopt)
  bench=(bench) host=(bench --host --peer 'torch fused' --peer 'torch foreach') check=(check --quick --json)
else
  tritopt=("$python" "${work:-}/bare.py")
  bench=(bench) host=(host) check=(check)
fi
plots=()
has typer && has rich && has matplotlib && plots=(--plot "$out/bench.png" --plot "$out/bench.svg")
selection=() large=(tests/engine/test_large.py) names='' suite=(tests tritopt --ignore tests/distributed --ignore tests/ecosystem)
# Neither these nor the ecosystem's tests run anything on a GPU. Host times are taken where nothing else runs.
suite+=(--ignore tests/project/test_quality.py --ignore tests/project/test_packaging.py --ignore tests/project/test_examples.py)
suite+=(--ignore tests/engine/test_large.py --ignore tests/tools/test_host_time.py)
# What a missing package keeps out is said once, and is not a failure of what runs.
lacking() {  # PACKAGES PATH...
  [ -n "$plan" ] || say "tests: without $1: ${*:2}"
  for path in "${@:2}"; do suite+=(--ignore "$path"); done
}
{ has typer && has rich; } || lacking "typer or rich" tritopt/commands tritopt/__main__.py tests/support/golden_cases.py \
  tests/mutations.py tests/engine/test_autotune.py tests/mxnet/test_golden.py \
  tests/tools/test_{bench,bench_host,check,inspect,numerics}.py \
  tests/optim/test_torch_{parity,arguments}.py
has hypothesis || lacking hypothesis tests/mxnet/test_properties.py tests/test_lr_scheduler.py
# A measurement, and so where nothing else runs.
measured=(tests/tools/test_host_time.py)
has typer && has rich && [ -z "$rehearse" ] && measured+=(tests/tools/test_bench.py::test_on_a_gpu)
suite+=(--deselect tests/tools/test_bench.py::test_on_a_gpu)
distributed=(tests/distributed)
rounds=10
if [ -n "$rehearse" ]; then
  selection=(--shapes resnet50 --peer 'torch fused')
  if has typer && has rich; then selection=(--rehearse "${selection[@]}"); else selection=(--rehearse 1 "${selection[@]}"); fi
  suite=(tests/tools/test_cost.py tests/mxnet/test_registry.py) distributed=(tests/distributed/test_random_bits.py) rounds=5
  names='sgd lion'
fi

# What is measured first, alone.
part bench 190 bench.log "${tritopt[@]}" "${bench[@]}" --seconds 165 --save "$out/bench.json" \
  ${plots[@]+"${plots[@]}"} ${selection[@]+"${selection[@]}"}
part host 40 bench.log "${tritopt[@]}" "${host[@]}" --rounds $rounds --save "$out/host.json"
part host-time 30 tests.log "${pytest[@]}" "${measured[@]}"
part large 60 tests.log "${pytest[@]}" "${large[@]}"

# Then what may share the machine. One optimizer a process, so that what is not reached costs only itself.
check_all() {
  local names=${names:-$("$python" -c 'import tritopt; print(*tritopt.names())')} code=0
  mkdir -p "$work/checks"
  [ -n "$names" ] || { echo "no optimizers to check"; return 1; }
  echo "$names" | tr ' ' '\n' | xargs -P "${CHECKS:-6}" -I{} bash -c \
    '"$@" --optimizer {} >"$work/checks/{}.json" 2>"$work/checks/{}.err" || { echo "{}: not green"; tail -n 3 "$work/checks/{}.err"; exit 1; }' \
    bash "$@" || code=1
  return $code
}
export -f check_all
export python work names
# What measuring did not need is theirs.
limit=200
[ -z "$plan" ] && [ $((565 - SECONDS)) -gt $limit ] && limit=$((565 - SECONDS))
beside check $limit bash -c 'check_all "$@"' bash "${tritopt[@]}" "${check[@]}"
beside distributed $limit env CUDA_VISIBLE_DEVICES= "${pytest[@]}" "${distributed[@]}"
part tests $limit tests.log "${pytest[@]}" ${parallel[@]+"${parallel[@]}"} "${suite[@]}"
[ -n "$plan" ] && exit 0
wait
join check $limit
join distributed $limit
"$python" - "$work/checks" "$out/check.json" >"$work/checks.txt" <<'END'
import json
import sys
from pathlib import Path

found = {"rows": [], "unfinished": []}
for path in sorted(Path(sys.argv[1]).glob("*.json")):
    try:
        part = json.loads(path.read_text())
    except ValueError:
        found["unfinished"].append(path.stem)
        continue
    found = {**part, "rows": found["rows"] + part["rows"], "unfinished": found["unfinished"]}
red = sorted({row["optimizer"] for row in found["rows"] if not row["passed"]})
found["passed"] = bool(found["rows"]) and not red and not found["unfinished"]
Path(sys.argv[2]).write_text(json.dumps(found, indent=1))
print(f"check: {len(found['rows'])} checks, red: {', '.join(red) or 'none'}, unfinished: {len(found['unfinished'])}")
END
say "$(<"$work/checks.txt")"

for log in bench.log tests.log; do
  echo "-- the end of $log"
  tail -n 12 "$out/$log"
done
grep -E '^(FAILED|ERROR) ' "$out/tests.log" | sort -u | head -n 40 | tee -a "$out/summary.txt"
if [ ${#failed[@]} -gt 0 ]; then
  say "FAILED: ${failed[*]} (see $out)"
  exit 1
fi
say "all passed (see $out)"
