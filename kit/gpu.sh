#!/usr/bin/env bash
# Builds, tests and measures pinfer on a GPU machine without a network. `./gpu.sh help` says how; docs/gpu.md says more.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SOURCES=$HERE/src
PYTHON=${PYTHON:-python3}
JOBS=${JOBS:-$(nproc)}
CUDA_PARTS=6 # ggml-cuda is most of the build: in so many steps

usage() {
    cat <<'END'
usage: ./gpu.sh build | test | bench CASE | all | report | cases | help

  build       llama.cpp for the GPU that is found, pinfer on top of it
  test        the device tests on that GPU, and compute-sanitizer where it runs
  bench CASE  one row of the table against llama.cpp (cases: lists them)
  all         build, test, every case
  report      the table of what is finished

Every finished step leaves a stamp and is not repeated: call the same command again to go on. Each ends with a short table
and writes JSON under results/.

  GPU=none            build and run on the CPU alone       CUDA_ARCH=90   build for a GPU that is not here
  LIMIT=570           stop after so many seconds; the next call goes on
  WORK=DIR            where models are written (default: the roomier one of ./work and /dev/shm)
  JOBS=N PYTHON=FILE  jobs of the build; Python 3.11 or newer with numpy
END
}

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# --- what is here ----------------------------------------------------------------------------------------------------

# Sets ARCH (of CUDA; empty: no CUDA) and MODE, which names the folder of everything built and measured.
find_gpu() {
    ARCH=${CUDA_ARCH:-}
    if [[ ${GPU:-} == none ]]; then
        ARCH=
    elif [[ -z $ARCH ]]; then
        ARCH=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d '. ' | grep -E '^[0-9]+$' |
            sort -u | paste -sd ';' || true)
        [[ -n $ARCH ]] || die "no NVIDIA GPU found (nvidia-smi lists none): GPU=none builds for the CPU alone," \
            "CUDA_ARCH=90 for a GPU that is not here"
    fi
    MODE=cpu
    [[ -z $ARCH ]] || MODE=cuda-${ARCH//;/-}
    DEVICE=CPU
    [[ -z $ARCH ]] || DEVICE=CUDA0
    OUT=$HERE/out/$MODE
    RESULTS=$HERE/results/$MODE
    mkdir -p "$OUT/stamps" "$OUT/logs" "$RESULTS"
}

# What pinfer's Python runs with: its own sources, llama-cpp-python over the libraries built here, the kit's packages,
# and, where scipy is missing, what stands in for it.
environment() {
    export PYTHONPATH=$OUT/site:$SOURCES:$SOURCES/site
    if [[ ! -e $OUT/scipy ]]; then
        "$PYTHON" -c 'import scipy.linalg, scipy.optimize, scipy.special' 2>/dev/null &&
            echo scipy >"$OUT/scipy" || echo substitute >"$OUT/scipy"
    fi
    [[ $(cat "$OUT/scipy") == scipy ]] || PYTHONPATH+=:$SOURCES/kit/substitute
    export PYTHONPATH PYTHONDONTWRITEBYTECODE=1 PINFER_NATIVE_DIR=$OUT/native PINFER_HOME=$OUT/home
    export KIT_DEVICE=$DEVICE KIT_RESULTS=$RESULTS KIT_BIN=$OUT/site/bin KIT_MODE=$MODE
}

# --- steps -----------------------------------------------------------------------------------------------------------

# step NAME: run step_NAME in a process of its own, once; its output goes to a log. The exit code is 75 when the time of
# this call is over: what was done so far is kept, and the next call goes on with the same step.
step() {
    local name=$1 log=$OUT/logs/$1.log begin=$SECONDS status=0 left=86400
    [[ ! -e $OUT/stamps/$name ]] || return 0
    if [[ -n ${LIMIT:-} ]]; then
        left=$((LIMIT - SECONDS))
        ((left > 5)) || pause "$name"
    fi
    say "$name …"
    # timeout puts the step in a process group of its own and so reaches all that it started.
    timeout --kill-after=10 "$left" bash "$HERE/gpu.sh" --step "$name" >"$log" 2>&1 </dev/null || status=$?
    ((status != 124 && status != 137)) || [[ -z ${LIMIT:-} ]] || pause "$name"
    if ((status)); then
        tail -n 25 "$log" >&2
        die "$name failed (exit code $status); its output is in $log"
    fi
    echo $((SECONDS - begin)) >"$OUT/stamps/$name"
}

pause() {
    say "the time of this call is over in step $1; call again to go on"
    exit 75
}

# --- build -----------------------------------------------------------------------------------------------------------

# Files that are as they were keep their times, so that after another kit was unpacked here only what changed is compiled.
step_unpack() {
    rm -rf "$SOURCES.tmp"
    "$PYTHON" - "$HERE" "$SOURCES" <<'END'
import lzma, os, pathlib, sys, tarfile
here, old = map(pathlib.Path, sys.argv[1:])
new = old.with_name(old.name + ".tmp")
with tarfile.open(here / "sources.tar.bz2") as tar:
    tar.extractall(new, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
for packed in here.glob("*.gguf.xz"):
    (new / "models" / packed.stem).write_bytes(lzma.decompress(packed.read_bytes()))
for file in filter(pathlib.Path.is_file, new.rglob("*")):
    before = old / file.relative_to(new)
    if before.is_file() and before.read_bytes() == file.read_bytes():
        os.utime(file, ns=(before.stat().st_mtime_ns,) * 2)
    else:
        os.utime(file)
END
    rm -rf "$SOURCES"
    mv "$SOURCES.tmp" "$SOURCES"
}

# A toolkit can be in pieces: Python's packages bring cuBLAS into a folder of their own, and a machine without a GPU has no
# driver to link. Sets CMAKE_CUDA and exports what nvcc needs to find the headers.
cuda_options() {
    local nvcc found folder
    nvcc=$(command -v nvcc || ls "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" 2>/dev/null) || die "no nvcc: install CUDA's toolkit"
    CMAKE_CUDA=(-DGGML_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=$ARCH" "-DCMAKE_CUDA_COMPILER=$nvcc")
    folder=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
    [[ -d $folder/include ]] || folder=${CUDA_HOME:-/usr/local/cuda}
    mkdir -p "$OUT/cuda"
    if ! ls "$folder"/include/cublas_v2.h "$folder"/targets/*/include/cublas_v2.h >/dev/null 2>&1; then
        found=${CUBLAS_DIR:-$("$PYTHON" -c 'import glob, sys
print(next((p for s in sys.path for p in sorted(glob.glob(f"{s}/nvidia/cu*[0-9]") + glob.glob(f"{s}/nvidia/cublas"))
            if glob.glob(f"{p}/include/cublas_v2.h")), ""))')}
        [[ -n $found ]] || die "no cublas_v2.h in $folder or among Python's packages: CUBLAS_DIR=DIR names its folder"
        export CPATH=$found/include${CPATH:+:$CPATH}
        for name in cublas cublasLt; do
            ln -sf "$(ls "$found"/lib/lib$name.so.* | head -n 1)" "$OUT/cuda/lib$name.so"
            CMAKE_CUDA+=("-DCUDA_${name}_LIBRARY=$OUT/cuda/lib$name.so")
        done
        # The links are to be found by the linker, the libraries themselves at run time.
        CMAKE_CUDA+=("-DKIT_RPATH=$found/lib")
    fi
    if ! ls "$folder"/lib64/stubs/libcuda.so "$folder"/targets/*/lib/stubs/libcuda.so >/dev/null 2>&1; then
        found=$(ldconfig -p | sed -n 's/.*libcuda\.so\.1 .*=> //p' | head -n 1)
        if [[ -n $found ]]; then
            ln -sf "$found" "$OUT/cuda/libcuda.so"
        else
            # Nothing here could run it anyway; the driver's own library takes this one's place where there is one.
            echo | "${CC:-cc}" -shared -x c - -o "$OUT/cuda/libcuda.so" -Wl,-soname,libcuda.so.1
        fi
        CMAKE_CUDA+=("-DCUDA_cuda_driver_LIBRARY=$OUT/cuda/libcuda.so")
    fi
}

step_configure() {
    CMAKE_CUDA=()
    [[ -z $ARCH ]] || cuda_options
    cmake -S "$SOURCES/kit" -B "$OUT/llama" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_CCACHE=OFF \
        -DCMAKE_INSTALL_PREFIX="$OUT/site" "${CMAKE_CUDA[@]}"
    mkdir -p "$OUT/site"
    cp -r "$SOURCES/site/llama_cpp" "$OUT/site/"
}

llama_ninja() {
    # Found at configuration and needed again by every compilation.
    local cublas
    cublas=$(sed -n 's/^KIT_RPATH:[A-Z]*=\(.*\)/\1/p' "$OUT/llama/CMakeCache.txt")
    [[ -z $cublas ]] || export CPATH=$(dirname "$cublas")/include${CPATH:+:$CPATH}
    ninja -C "$OUT/llama" -j "$JOBS" "$@"
}

step_ggml() { llama_ninja ggml-base ggml-cpu ggml-rpc; }

# cuda_part N: the N-th part of ggml-cuda's objects, dealt out like cards since the large ones have neighbouring names.
cuda_part() {
    local objects
    mapfile -t objects < <(ninja -C "$OUT/llama" -t targets all | sed -n 's/^\(.*ggml-cuda\.dir.*\.o\): .*/\1/p' |
        awk -v n="$1" -v parts="$CUDA_PARTS" 'NR % parts == n - 1')
    ((${#objects[@]})) || die "ninja lists no objects of ggml-cuda"
    llama_ninja "${objects[@]}"
}

step_cuda-link() { llama_ninja ggml-cuda; }
step_llama() { llama_ninja llama; }
step_benches() { llama_ninja llama-bench llama-batched-bench; }

step_install() {
    cmake --install "$OUT/llama" --strip
    # Python loads the libraries from llama_cpp/lib, plugin and runner link those in lib: the same files.
    ln -sfn ../lib "$OUT/site/llama_cpp/lib"
}

step_native() {
    cmake -S "$SOURCES/native" -B "$OUT/native" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$OUT/site" \
        -DPINFER_GGML_BACKEND_IMPL="$SOURCES/llama.cpp/ggml/src/ggml-backend-impl.h"
    ninja -C "$OUT/native" -j "$JOBS"
}

step_check() {
    environment
    "$PYTHON" "$SOURCES/kit/report.py" check
}

build() {
    command -v cmake >/dev/null || die "no cmake"
    command -v ninja >/dev/null || die "no ninja"
    "$PYTHON" -c 'import sys, numpy; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        die "$PYTHON is older than 3.11 or has no numpy: PYTHON=FILE names another"
    local kit
    kit=$(cksum <"$HERE/sources.tar.bz2" 2>/dev/null || true)
    if [[ ! -d $SOURCES || $(cat "$OUT/kit" 2>/dev/null) != "$kit" ]]; then
        # Of another kit's work what was made of the models alone is still good.
        find "$OUT/stamps" -type f ! -name 'bench-*-model' ! -name 'bench-*-profile' ! -name 'bench-*-train' -delete
    fi
    step unpack
    echo "$kit" >"$OUT/kit"
    step configure
    step ggml
    if [[ -n $ARCH ]]; then
        for ((part = 1; part <= CUDA_PARTS; part++)); do step "cuda-$part"; done
        step cuda-link
    fi
    for name in llama benches install native check; do step "$name"; done
}

# --- test ------------------------------------------------------------------------------------------------------------

step_test-native() {
    ctest --test-dir "$OUT/native" --output-on-failure --no-tests=error
}

# run_pytest NAME FILE…: results go where the report reads them.
run_pytest() {
    environment
    local name=$1
    shift
    cd "$SOURCES"
    # The CPU and RPC servers are tested anyway.
    OMP_WAIT_POLICY=passive PINFER_TEST_DEVICES=${ARCH:+$DEVICE} "$PYTHON" -m pytest -q -p no:cacheprovider \
        --junit-xml="$RESULTS/$name.xml" "$@"
}

step_test-devices() { run_pytest test-devices tests/test_devices.py; }
step_test-python() { run_pytest test-python tests/test_native.py tests/test_exact.py; }
step_test-sanitizer() {
    environment
    "$PYTHON" "$SOURCES/kit/sanitize.py"
}

run_tests() {
    build
    step test-native
    [[ ! -e $SOURCES/tests/test_devices.py ]] || step test-devices
    step test-python
    [[ -z $ARCH ]] || step test-sanitizer
}

# --- bench -----------------------------------------------------------------------------------------------------------

# Where models go: whichever of disk and memory has more room, once chosen for good. And on which GPU.
choose_work() {
    # One GPU, the same for the driver's numbering and CUDA's: llama.cpp would use all there are.
    export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
    if [[ -n ${WORK:-} ]]; then
        mkdir -p "$WORK"
        echo "$WORK" >"$OUT/work"
    elif [[ ! -e $OUT/work ]]; then
        local here shared=0
        here=$(df -Pk "$HERE" | awk 'NR == 2 {print $4}')
        [[ ! -w /dev/shm ]] || shared=$(df -Pk /dev/shm | awk 'NR == 2 {print $4}')
        if ((shared > here)); then echo /dev/shm/pinfer-kit; else echo "$HERE/work"; fi >"$OUT/work"
    fi
    KIT_WORK=$(cat "$OUT/work")
    export KIT_WORK
    mkdir -p "$KIT_WORK"
}

# Steps of a case are called bench-CASE-STEP; bench.py knows which there are.
bench() {
    local case=$1 name
    build
    environment
    choose_work
    "$PYTHON" "$SOURCES/kit/bench.py" cases | cut -d' ' -f1 | grep -qx -- "$case" || die "no case $case: ./gpu.sh cases"
    for name in $("$PYTHON" "$SOURCES/kit/bench.py" steps "$case"); do step "bench-$case-$name"; done
}

run_bench_step() {
    environment
    choose_work
    local rest=${1#bench-} name
    name=${rest##*-}
    "$PYTHON" "$SOURCES/kit/bench.py" step "${rest%-*}" "$name"
}

report() {
    environment
    "$PYTHON" "$SOURCES/kit/report.py" table "$OUT"
}

# --- the command line ------------------------------------------------------------------------------------------------

main() {
    case ${1:-help} in
    help | -h | --help) usage; return ;;
    build | test | bench | all | report | cases) ;;
    *) usage >&2; exit 2 ;;
    esac
    [[ $1 != bench || $# -eq 2 ]] || { usage >&2; exit 2; }
    find_gpu
    [[ -z ${LIMIT:-} || $LIMIT =~ ^[0-9]+$ ]] || die "LIMIT=$LIMIT is no number of seconds"
    case $1 in
    build) build; report ;;
    test) run_tests; report ;;
    bench) bench "$2"; report ;;
    all)
        run_tests
        environment
        for name in $("$PYTHON" "$SOURCES/kit/bench.py" cases | cut -d' ' -f1); do bench "$name"; done
        report
        ;;
    report) [[ -d $SOURCES ]] || die "nothing is built: ./gpu.sh build"; report ;;
    cases)
        [[ -d $SOURCES ]] || step unpack
        environment
        "$PYTHON" "$SOURCES/kit/bench.py" cases
        ;;
    esac
}

if [[ ${1:-} == --step ]]; then
    find_gpu
    case $2 in
    cuda-[0-9]*) cuda_part "${2#cuda-}" ;;
    bench-*) run_bench_step "$2" ;;
    *) "step_$2" ;;
    esac
else
    main "$@"
fi
