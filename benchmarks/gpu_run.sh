#!/usr/bin/env bash
# Runs everything that needs a GPU, from a checkout. Installs and downloads nothing.
#   OUT=results benchmarks/gpu_run.sh [PART ...]
# Parts (default: all), each under 10 minutes. A part can be started again:
#   env gpu_tests kernel_tests checkers kernels step loops data train accuracy autotune sweep
# OUT: folder for rows.jsonl (rows of benchmarks), a log for every part, and the runs.
# MOCOFAST_DATA: folder with the archives of images.
# PYTHONPATH may name a folder with DALI and the peers of the kernels (extra `bench`).
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_results}
mkdir -p "$OUT"
export PYTHONPATH=".:kernels:benchmarks${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
mocofast="$python -m mocofast"
rows=$OUT/rows.jsonl

part_env() {
	nvidia-smi
	$mocofast doctor
}

part_gpu_tests() {
	timeout 580 $python -m pytest -m gpu -p no:cacheprovider --durations=10 tests
}

part_kernel_tests() {
	# On a GPU these tests use Triton's compiler. Without a GPU they use Triton's interpreter.
	timeout 580 $python -m pytest -m "not gpu and not slow" -p no:cacheprovider --durations=10 \
		tests/test_kernels_*.py tests/test_ops*.py tests/test_moco.py tests/test_encoders.py
}

part_checkers() {
	if ! command -v compute-sanitizer >/dev/null; then
		echo "compute-sanitizer is not on PATH: this part is left out"
		return 0
	fi
	for tool in memcheck racecheck; do
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 280 \
			compute-sanitizer --tool $tool --error-exitcode 9 \
			$python -m pytest -q -x -p no:cacheprovider -k "not compile" \
			tests/test_kernels_{infonce,enqueue,ema}.py
	done
}

part_kernels() {
	for shape in "256 65536 128" "32 65536 128" "1024 65536 128" "4096 65536 128" \
		"4096 65536 256" "256 1048576 128"; do
		read -r n k c <<<"$shape"
		for dtype in float32 bfloat16; do
			timeout 150 $mocofast bench kernels --n "$n" --k "$k" --c "$c" --dtype $dtype \
				--save "$rows" ${compile-}
		done
		local compile=--no-compile # compiling takes minutes: only for the first shape
	done
	timeout 120 $mocofast bench ema --save "$rows"
	timeout 120 $mocofast bench norm --save "$rows"
	timeout 120 $mocofast bench optim --save "$rows"
}

part_step() {
	timeout 300 $mocofast bench step --save "$rows" --plot "$OUT/step.png"
}

part_loops() {
	# Two sides compile the encoders of ResNet-50, and compile again to measure memory.
	timeout 580 $mocofast bench train "$(unpack imagenet-sample-500.tar)" \
		--save "$rows" --plot "$OUT/train.png"
}

part_sweep() {
	timeout 580 $mocofast bench sweep "$OUT/sweep" --dtype bfloat16 --no-compile --save "$rows"
}

unpack() { # ARCHIVE: unpacks the archive once and prints the folder
	local folder=/tmp/mocofast_${1%%.*}
	[ -d "$folder" ] || { mkdir -p "$folder" && tar xf "$MOCOFAST_DATA/$1" -C "$folder"; }
	echo "$folder"
}

part_data() {
	local photos
	photos=$(unpack imagenet-sample-500.tar)
	timeout 200 $mocofast bench data "$photos" --device cuda --save "$rows" --plot "$OUT/data.png"
	timeout 380 $mocofast bench data "$photos" --device cuda --tune --out "$OUT/tuned.yaml"
}

part_train() {
	timeout 200 $mocofast pretrain --train.dir "$OUT/digits" --profile
	timeout 300 $mocofast pretrain moco_v2_r50_200ep --data.path "$(unpack imagenet-sample-500.tar)" \
		--data.batch_size 64 --train.max_steps 50 --train.log_every 10 --train.dir "$OUT/photos"
}

part_accuracy() {
	# The CIFAR-10 demo of MoCo's authors. The run resumes: repeat the part until 200 epochs are done.
	timeout -s TERM 570 $mocofast pretrain cifar10_r18 --data.source folder --data.loader device \
		--data.path "$(unpack cifar10-jpeg.tar.xz)" --model.queue_dtype bfloat16 \
		--train.dir "$OUT/cifar10" --resume auto --checkpoint.keep 0
}

part_autotune() {
	timeout 580 $mocofast bench autotune --c 64 128 256 --out "$OUT/tiles.json"
}

all="env gpu_tests kernel_tests checkers kernels step loops data train accuracy autotune sweep"
for part in "${@:-$all}"; do
	for name in $part; do
		echo "== $name"
		"part_$name" 2>&1 | tee "$OUT/$name.log"
		echo "== $name ended with ${PIPESTATUS[0]}"
	done
done
