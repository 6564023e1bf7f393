#!/usr/bin/env bash
# Builds, tests and measures pinfer on a GPU machine without a network. See `./gpu.sh help` and docs/gpu.md.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SOURCES=$HERE/src
PYTHON=${PYTHON:-python3}
JOBS=${JOBS:-$(nproc)}
CUDA_PARTS=6 # ggml-cuda takes most of the build time, so it is built in this many steps

usage() {
    cat <<'END'
usage: ./gpu.sh build | test | bench CASE | all | report | cases | help

  build       build llama.cpp for the GPU in this machine, and pinfer on top of it
  test        run the device tests on that GPU, and compute-sanitizer if it works here
  bench CASE  measure one case against llama.cpp
  all         build, test, and measure every case
  report      print the results so far
  cases       list the cases

A finished step is not repeated: to continue, run the same command again. Every command ends with a short table and
writes JSON under results/.

Environment variables:

  GPU=none        build and run on the CPU alone
  CUDA_ARCH=90    build for this compute capability, for a GPU in another machine
  LIMIT=570       stop after this many seconds; the next call continues
  WORK=DIR        folder for the models (default: ./work or /dev/shm, whichever has more free space)
  JOBS=N          parallel build jobs
  PYTHON=FILE     Python 3.11 or newer with numpy and scipy
END
}

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# --- the GPU ---------------------------------------------------------------------------------------------------------

# Sets ARCH, the CUDA architectures (empty without CUDA), and MODE, the name of the folders under out/ and results/.
find_gpu() {
    ARCH=${CUDA_ARCH:-}
    if [[ ${GPU:-} == none ]]; then
        ARCH=
    elif [[ -z $ARCH ]]; then
        ARCH=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d '. ' | grep -E '^[0-9]+$' |
            sort -u | paste -sd ';' || true)
        [[ -n $ARCH ]] || die "no NVIDIA GPU found (nvidia-smi lists none); set GPU=none to build for the CPU alone," \
            "or CUDA_ARCH=90 to build for a GPU in another machine"
    fi
    MODE=cpu
    [[ -z $ARCH ]] || MODE=cuda-${ARCH//;/-}
    DEVICE=CPU
    [[ -z $ARCH ]] || DEVICE=CUDA0
    OUT=$HERE/out/$MODE
    RESULTS=$HERE/results/$MODE
    mkdir -p "$OUT/stamps" "$OUT/logs" "$RESULTS"
}

# Sets up Python: pinfer's sources, llama-cpp-python with the libraries built here, and the kit's packages.
environment() {
    export PYTHONPATH=$OUT/site:$SOURCES:$SOURCES/site
    export PYTHONDONTWRITEBYTECODE=1 PINFER_NATIVE_DIR=$OUT/native PINFER_HOME=$OUT/home
    export KIT_DEVICE=$DEVICE KIT_RESULTS=$RESULTS KIT_BIN=$OUT/site/bin KIT_MODE=$MODE
}

# --- steps -----------------------------------------------------------------------------------------------------------

# step NAME: runs step_NAME once, in its own process, with its output in a log. When LIMIT is reached it exits with code
# 75; finished work is kept, and the next call continues with the same step.
step() {
    local name=$1 log=$OUT/logs/$1.log begin=$SECONDS status=0 left=86400
    [[ ! -e $OUT/stamps/$name ]] || return 0
    if [[ -n ${LIMIT:-} ]]; then
        left=$((LIMIT - SECONDS))
        ((left > 5)) || pause "$name"
    fi
    say "$name …"
    # timeout puts the step in its own process group, so its signal reaches every process the step started.
    timeout --kill-after=10 "$left" bash "$HERE/gpu.sh" --step "$name" >"$log" 2>&1 </dev/null || status=$?
    ((status != 124 && status != 137)) || [[ -z ${LIMIT:-} ]] || pause "$name"
    if ((status)); then
        tail -n 25 "$log" >&2
        die "$name failed with exit code $status; see $log"
    fi
    echo $((SECONDS - begin)) >"$OUT/stamps/$name"
}

pause() {
    say "LIMIT reached in step $1; run the same command again to continue"
    exit 75
}

# --- build -----------------------------------------------------------------------------------------------------------

# Unchanged files keep their modification time, so that unpacking a newer kit recompiles only what changed.
step_unpack() {
    rm -rf "$SOURCES.tmp"
    "$PYTHON" - "$HERE" "$SOURCES" <<'END'
import lzma, os, pathlib, sys, tarfile
here, old = map(pathlib.Path, sys.argv[1:])
new = old.with_name(old.name + ".tmp")
with tarfile.open(here / "sources.tar.xz") as tar:
    tar.extractall(new, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
for packed in here.glob("*.gguf.xz"):
    planes = lzma.decompress(packed.read_bytes())  # the even bytes, then the odd ones
    model = bytearray(len(planes))
    model[0::2], model[1::2] = planes[: (len(planes) + 1) // 2], planes[(len(planes) + 1) // 2 :]
    (new / "models" / packed.stem).write_bytes(model)
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

# A CUDA toolkit can be incomplete: pip's packages put cuBLAS into their own folder, and a machine without a GPU has no
# driver to link against. Sets CMAKE_CUDA, and CPATH so that nvcc finds the headers.
cuda_options() {
    local nvcc found folder
    nvcc=$(command -v nvcc || ls "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" 2>/dev/null) ||
        die "nvcc not found: install the CUDA toolkit, or set CUDA_HOME to its folder"
    CMAKE_CUDA=(-DGGML_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=$ARCH" "-DCMAKE_CUDA_COMPILER=$nvcc")
    folder=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
    [[ -d $folder/include ]] || folder=${CUDA_HOME:-/usr/local/cuda}
    mkdir -p "$OUT/cuda"
    if ! ls "$folder"/include/cublas_v2.h "$folder"/targets/*/include/cublas_v2.h >/dev/null 2>&1; then
        found=${CUBLAS_DIR:-$("$PYTHON" -c 'import glob, sys
print(next((p for s in sys.path for p in sorted(glob.glob(f"{s}/nvidia/cu*[0-9]") + glob.glob(f"{s}/nvidia/cublas"))
            if glob.glob(f"{p}/include/cublas_v2.h")), ""))')}
        [[ -n $found ]] ||
            die "no cublas_v2.h in $folder or in Python's nvidia packages: set CUBLAS_DIR to the folder of cuBLAS"
        export CPATH=$found/include${CPATH:+:$CPATH}
        for name in cublas cublasLt; do
            ln -sf "$(ls "$found"/lib/lib$name.so.* | head -n 1)" "$OUT/cuda/lib$name.so"
            CMAKE_CUDA+=("-DCUDA_${name}_LIBRARY=$OUT/cuda/lib$name.so")
        done
        # The linker uses the links made above; at run time the libraries are found in their own folder.
        CUBLAS_RPATH=$found/lib
    fi
    cuda_driver "$folder"
}

# The driver's library, libcuda.so.1: the toolkit's stub of it, or the library itself, or else an own stub. Programs are linked
# against libggml-cuda, which needs it, so the linker has to find it under that name as well: in a folder of its own, which
# no program looks into when it runs.
cuda_driver() {
    local folder=$1 found candidates=()
    mkdir -p "$OUT/cuda/link"
    found=$(ls "$folder"/lib64/stubs/libcuda.so "$folder"/targets/*/lib/stubs/libcuda.so 2>/dev/null | head -n 1 || true)
    if [[ -z $found ]]; then
        # Containers mount it where ldconfig may not look.
        IFS=: read -ra candidates <<< "${LD_LIBRARY_PATH:-}"
        candidates+=(/usr/local/nvidia/lib64 /usr/local/nvidia/lib /usr/lib/wsl/lib /run/opengl-driver/lib)
        found=$({ ldconfig -p 2>/dev/null || /sbin/ldconfig -p; } | sed -n 's/.*libcuda\.so\.1 .*=> //p' | head -n 1)
        for candidate in "${candidates[@]}"; do
            [[ -n $found || ! -e $candidate/libcuda.so.1 ]] || found=$candidate/libcuda.so.1 DRIVER_RPATH=$candidate
        done
        if [[ -z $found ]]; then
            # Nothing can run here; elsewhere the driver's own library is loaded. Without the functions that ggml-cuda calls,
            # the linker would leave the library out.
            found=$OUT/cuda/libcuda-stub.so
            grep -rohE '\bcu[A-Z][A-Za-z0-9]*_?v?[0-9]*\(' "$SOURCES/llama.cpp/ggml/src/ggml-cuda" | sort -u |
                sed 's/(//; s/.*/void &(void);\nvoid &(void) {}/' > "$OUT/cuda/stub.c"
            "${CC:-cc}" -shared -fPIC -o "$found" "$OUT/cuda/stub.c" -Wl,-soname,libcuda.so.1
        fi
        ln -sf "$found" "$OUT/cuda/libcuda.so"
        CMAKE_CUDA+=("-DCUDA_cuda_driver_LIBRARY=$OUT/cuda/libcuda.so")
    fi
    ln -sf "$found" "$OUT/cuda/link/libcuda.so.1"
}

# Where the linker finds what libraries need in turn.
link_flags() {
    [[ ! -d $OUT/cuda/link ]] || printf '%s\n' "-DCMAKE_EXE_LINKER_FLAGS=-Wl,-rpath-link,$OUT/cuda/link" \
        "-DCMAKE_SHARED_LINKER_FLAGS=-Wl,-rpath-link,$OUT/cuda/link"
}

step_configure() {
    CMAKE_CUDA=()
    CUBLAS_RPATH='' DRIVER_RPATH=''
    local link=()
    [[ -z $ARCH ]] || cuda_options
    [[ -z $CUBLAS_RPATH ]] || CMAKE_CUDA+=("-DKIT_CUBLAS=$CUBLAS_RPATH")
    [[ -z $CUBLAS_RPATH$DRIVER_RPATH ]] || CMAKE_CUDA+=("-DKIT_RPATH=$CUBLAS_RPATH;$DRIVER_RPATH")
    mapfile -t link < <(link_flags)
    cmake -S "$SOURCES/kit" -B "$OUT/llama" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_CCACHE=OFF \
        -DCMAKE_INSTALL_PREFIX="$OUT/site" "${CMAKE_CUDA[@]}" "${link[@]}"
    mkdir -p "$OUT/site"
    cp -r "$SOURCES/site/llama_cpp" "$OUT/site/"
}

llama_ninja() {
    # Configuration found this folder; every compilation needs its headers.
    local cublas
    cublas=$(sed -n 's/^KIT_CUBLAS:[A-Z]*=\(.*\)/\1/p' "$OUT/llama/CMakeCache.txt")
    [[ -z $cublas ]] || export CPATH=$(dirname "$cublas")/include${CPATH:+:$CPATH}
    ninja -C "$OUT/llama" -j "$JOBS" "$@"
}

step_ggml() { llama_ninja ggml-base ggml-cpu ggml-rpc; }

# cuda_part N: builds every CUDA_PARTS-th object of ggml-cuda, starting with the N-th. The slow ones have similar names;
# this spreads them over the parts.
cuda_part() {
    local objects
    mapfile -t objects < <(ninja -C "$OUT/llama" -t targets all | sed -n 's/^\(.*ggml-cuda\.dir.*\.o\): .*/\1/p' |
        awk -v n="$1" -v parts="$CUDA_PARTS" 'NR % parts == n - 1')
    ((${#objects[@]})) || die "ninja lists no objects of ggml-cuda; see $OUT/logs/configure.log"
    llama_ninja "${objects[@]}"
}

step_cuda-link() { llama_ninja ggml-cuda; }
step_llama() { llama_ninja llama llama-common mtmd; }
step_benches() { llama_ninja llama-bench llama-batched-bench; }

step_install() {
    cmake --install "$OUT/llama" --strip
    # Python loads the libraries from llama_cpp/lib; the plugin and the runner link to those in lib: the same files.
    ln -sfn ../lib "$OUT/site/llama_cpp/lib"
}

step_native() {
    local link=()
    mapfile -t link < <(link_flags)
    cmake -S "$SOURCES/native" -B "$OUT/native" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$OUT/site" \
        -DPINFER_LLAMA_SOURCE="$SOURCES/llama.cpp" "${link[@]}"
    ninja -C "$OUT/native" -j "$JOBS"
}

step_check() {
    environment
    "$PYTHON" "$SOURCES/kit/report.py" check
}

# The kit brings its other Python packages along; numpy and scipy are too large for it.
check_tools() {
    local name
    for name in cmake ninja; do
        command -v "$name" >/dev/null || die "$name not found: install it, or add its folder to PATH"
    done
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        die "$PYTHON is missing or older than 3.11: choose another one with PYTHON=FILE"
    for name in numpy scipy; do
        "$PYTHON" -c "import $name" 2>/dev/null ||
            die "$PYTHON has no $name: run $PYTHON -m pip install $name, or choose another Python with PYTHON=FILE"
    done
}

build() {
    check_tools
    local kit
    kit=$(cksum <"$HERE/sources.tar.xz" 2>/dev/null || true)
    if [[ ! -d $SOURCES || $(cat "$OUT/kit" 2>/dev/null) != "$kit" ]]; then
        # With a new kit, only models, profiles and predictors remain valid.
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

# run_pytest NAME FILE…: writes RESULTS/NAME.xml for the report.
run_pytest() {
    environment
    local name=$1
    shift
    cd "$SOURCES"
    # The CPU and RPC servers are always tested; this adds the GPU.
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
    step test-devices
    step test-python
    [[ -z $ARCH ]] || step test-sanitizer
}

# --- bench -----------------------------------------------------------------------------------------------------------

# Chooses the folder for the models (disk or memory, whichever has more free space; the choice is kept) and the GPU.
choose_work() {
    # llama.cpp would use every GPU. PCI_BUS_ID makes CUDA number them as nvidia-smi does.
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

# The steps of a case are called bench-CASE-STEP; bench.py lists them.
bench() {
    local case=$1 name
    build
    environment
    choose_work
    "$PYTHON" "$SOURCES/kit/bench.py" cases | cut -d' ' -f1 | grep -qx -- "$case" ||
        die "there is no case $case; list the cases with ./gpu.sh cases"
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
    [[ -z ${LIMIT:-} || $LIMIT =~ ^[0-9]+$ ]] || die "LIMIT=$LIMIT is not a number of seconds"
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
    report) [[ -d $SOURCES ]] || die "nothing has been built yet; run ./gpu.sh build"; report ;;
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
