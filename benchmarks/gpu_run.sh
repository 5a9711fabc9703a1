#!/usr/bin/env bash
# Everything that needs a GPU, in one go, from a plain checkout (nothing installed, nothing downloaded):
#   OUT=results benchmarks/gpu_run.sh [PART ...]
# Parts (all of them by default, each under 10 minutes and restartable):
#   env gpu_tests kernel_tests checkers kernels step loops data train accuracy autotune sweep
# OUT gets rows.jsonl (benchmark rows), a log per part, and the runs. MOCOFAST_DATA: folder with the image archives.
# DALI and the peers of the kernels (extra `bench`) may come from a folder on PYTHONPATH.
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
	# Tests that take a device run on the GPU, through the real compiler, where elsewhere Triton's interpreter is.
	timeout 580 $python -m pytest -m "not gpu and not slow" -p no:cacheprovider --durations=10 \
		tests/test_kernels_*.py tests/test_ops*.py tests/test_moco.py tests/test_encoders.py
}

part_checkers() {
	command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on PATH: left out"; return 0; }
	for tool in memcheck racecheck; do
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 280 compute-sanitizer --tool $tool --error-exitcode 9 \
			$python -m pytest -q -x -p no:cacheprovider tests/test_kernels_{infonce,enqueue,ema}.py -k "not compile"
	done
}

part_kernels() {
	for shape in "256 65536 128" "32 65536 128" "1024 65536 128" "4096 65536 128" "4096 65536 256" "256 1048576 128"; do
		read -r n k c <<<"$shape"
		for dtype in float32 bfloat16; do
			timeout 150 $mocofast bench kernels --n "$n" --k "$k" --c "$c" --dtype $dtype --save "$rows" ${compile-}
		done
		local compile=--no-compile # compilers build for minutes: for the first shape only
	done
	timeout 120 $mocofast bench ema --save "$rows"
	timeout 120 $mocofast bench norm --save "$rows"
	timeout 120 $mocofast bench optim --save "$rows"
}

part_step() {
	timeout 300 $mocofast bench step --save "$rows" --plot "$OUT/step.png"
}

part_loops() {
	# Two sides compile ResNet-50's encoders, each in the process that measures its memory too.
	timeout 580 $mocofast bench train "$(unpack imagenet-sample-500.tar)" --save "$rows" --plot "$OUT/train.png"
}

part_sweep() {
	timeout 580 $mocofast bench sweep "$OUT/sweep" --dtype bfloat16 --no-compile --save "$rows"
}

unpack() { # ARCHIVE: its folder under OUT, unpacked once
	local folder=/tmp/mocofast_${1%%.*}
	[ -d "$folder" ] || { mkdir -p "$folder" && tar xf "$MOCOFAST_DATA/$1" -C "$folder"; }
	echo "$folder"
}

part_data() {
	timeout 200 $mocofast bench data "$(unpack imagenet-sample-500.tar)" --device cuda --save "$rows" --plot "$OUT/data.png"
	timeout 380 $mocofast bench data "$(unpack imagenet-sample-500.tar)" --device cuda --tune --out "$OUT/tuned.yaml"
}

part_train() {
	timeout 200 $mocofast pretrain --train.dir "$OUT/digits" --profile
	timeout 300 $mocofast pretrain moco_v2_r50_200ep --data.path "$(unpack imagenet-sample-500.tar)" \
		--data.batch_size 64 --train.max_steps 50 --train.log_every 10 --train.dir "$OUT/photos"
}

part_accuracy() {
	# The authors' CIFAR-10 demo; restarts where it stopped, so repeat the part until 200 epochs are done.
	timeout -s TERM 570 $mocofast pretrain cifar10_r18 --data.source folder --data.loader device \
		--data.path "$(unpack cifar10-jpeg.tar.xz)" --model.queue_dtype bfloat16 \
		--train.dir "$OUT/cifar10" --resume auto --checkpoint.keep 0
}

part_autotune() {
	timeout 580 $mocofast bench autotune --c 64 128 256 --out "$OUT/tiles.json"
}

for part in "${@:-env gpu_tests kernel_tests checkers kernels step loops data train accuracy autotune sweep}"; do
	for name in $part; do
		echo "== $name"
		"part_$name" 2>&1 | tee "$OUT/$name.log"
		echo "== $name ended with ${PIPESTATUS[0]}"
	done
done
