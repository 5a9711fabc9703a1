#!/usr/bin/env bash
# Runs everything that needs a GPU, from a checkout. Installs and downloads nothing.
#   OUT=results benchmarks/gpu_run.sh [PART ...]
# Parts (default: all), each under 10 minutes. A part can be started again:
#   env gpu_tests kernel_tests checkers kernels step loops data train accuracy autotune sweep
# Ten minutes with a new GPU: `gpu_run.sh quick` (9.5 minutes), then `gpu_run.sh second` (4 minutes),
# and `gpu_run.sh cifar` (5 minutes).
# With DRY=1 all three do the same on a CPU at tiny sizes, which shows that the commands are sound.
# CLOCK: seconds for the part, instead of 570, 240 and 300.
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

# A wrong barrier hangs the warp-specialised sweep: its test runs alone, with a limit of its own.
specialised=tests/test_kernels_infonce_hopper.py
# Files with tests for a GPU. A package that a file needs and the machine lacks stops no other file.
gpu_files=($(grep -l "mark\.gpu" tests/test_*.py | grep -v "$specialised"))
gpu_tests=(-m gpu -p no:cacheprovider --continue-on-collection-errors)

# pytest prints what failed when Ctrl-C stops it, and nothing when SIGTERM does.
stop_tests=(timeout -s INT -k 10)

part_gpu_tests() {
	"${stop_tests[@]}" 480 $python -m pytest "${gpu_tests[@]}" --durations=10 "${gpu_files[@]}"
	"${stop_tests[@]}" 100 $python -m pytest -q -m gpu -p no:cacheprovider "$specialised"
}

part_kernel_tests() {
	# On a GPU these tests use Triton's compiler. Without a GPU they use Triton's interpreter.
	"${stop_tests[@]}" 570 $python -m pytest -m "not gpu and not slow" -p no:cacheprovider \
		--durations=10 tests/test_kernels_*.py tests/test_ops*.py tests/test_moco.py tests/test_encoders.py
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

unpack() { # ARCHIVE: unpacks the archive once and prints the folder. Fails without the archive
	local folder=${TMPDIR:-/tmp}/mocofast_${1%%.*} archive=${MOCOFAST_DATA:-.}/$1
	if [ ! -d "$folder" ]; then
		[ -f "$archive" ] || { echo "MOCOFAST_DATA must name a folder with $1" >&2 && return 1; }
		mkdir -p "$folder.part"
		tar xf "$archive" -C "$folder.part" || $python -m tarfile -e "$archive" "$folder.part" || return 1
		mv "$folder.part" "$folder"
	fi
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

# --- quick, second and cifar: short parts against a clock ---

clock_start() { # SECONDS: starts the clock of `within`. A dry run has half an hour
	SECONDS=0
	clock=${CLOCK:-${DRY:+1800}}
	clock=${clock:-$1}
	missing=()
}

within() { # NAME SECONDS COMMAND ...: runs a command, no longer than the clock allows
	local name=$1 limit=$2 left=$((clock - SECONDS)) stop=(timeout -k 10)
	shift 2
	[[ " $* " == *" -m pytest "* ]] && stop=("${stop_tests[@]}")
	# A dry run may take place on a busy CPU.
	[ -n "${DRY:-}" ] || ((left < limit)) && limit=$left
	if ((limit < 5)); then
		missing+=("$name (no time left)")
		return 0
	fi
	echo "-- $name, $limit s at most, $SECONDS s on the clock"
	"${stop[@]}" "$limit" "$@" 2>&1 | tee "$OUT/${name// /_}.log"
	local status=${PIPESTATUS[0]}
	((status == 0)) || missing+=("$name (status $status)")
}

clock_end() {
	if ((${#missing[@]})); then
		printf 'missing:'
		printf ' %s;' "${missing[@]}"
		printf ' %s s\n' "$SECONDS"
		return 1
	fi
	echo "missing: nothing; $SECONDS s"
}

part_quick() {
	local tests=(-m "not gpu and not slow" tests/test_kernels_*.py tests/test_ops*.py)
	local n=(256 4096) many=(-n 12) gpu=("${gpu_tests[@]}" -n 6 "${gpu_files[@]}") bench=($mocofast bench)
	local wide=(--k 65536 --c 128 --repeats 10) repeats=(--repeats 10) norm=() optim=() first=()
	# Sides that compile take a minute, and come last: a command that is stopped while it compiles
	# has no times.
	local other=(--no-compile) plain=(--modes eager graph) compiled=(--modes compile)
	local small=(--recipe moco_v2_r50_200ep --arch resnet18_cifar --size 32 --batch 256)
	local large=(--recipe moco_v2_r50_200ep --batch 128) queue=(--queue 65536)
	# A new process for every side would compile once more.
	local times=(--times-only --repeats 3)
	if [ -n "${DRY:-}" ]; then
		tests=(tests/test_kernels_ema.py -k "tied or near_one") many=()
		gpu=("${gpu_tests[@]}" tests/test_kernels_ema.py)
		n=(16 32) wide=(--k 2048 --c 32 --repeats 2) first=(--no-compile) repeats=(--repeats 2)
		plain=(--modes) compiled=(--modes)
		norm=(--n 8 --layer 6) optim=(--only sgd)
		small=(--arch resnet_tiny --size 16 --batch 8) large=("${small[@]}") queue=(--queue 64)
	fi
	clock_start 570
	within "environment" 30 $mocofast doctor
	within "kernel tests" 200 $python -m pytest -q -p no:cacheprovider "${many[@]}" "${tests[@]}"
	within "kernels bf16" 45 "${bench[@]}" kernels --n "${n[0]}" --dtype bfloat16 "${wide[@]}" \
		"${other[@]}" --save "$rows"
	within "kernels bf16 4096" 45 "${bench[@]}" kernels --n "${n[1]}" --dtype bfloat16 "${wide[@]}" \
		"${other[@]}" --save "$rows"
	within "kernels fp32" 45 "${bench[@]}" kernels --n "${n[0]}" "${wide[@]}" "${other[@]}" \
		--save "$rows"
	within "ema" 40 "${bench[@]}" ema "${repeats[@]}" --save "$rows"
	within "optim" 60 "${bench[@]}" optim "${repeats[@]}" "${optim[@]}" --save "$rows"
	within "norm" 60 "${bench[@]}" norm "${repeats[@]}" "${norm[@]}" --save "$rows"
	within "step small" 60 "${bench[@]}" step "${small[@]}" "${queue[@]}" "${times[@]}" \
		"${plain[@]}" --save "$rows"
	within "step ResNet-50" 90 "${bench[@]}" step "${large[@]}" "${queue[@]}" "${times[@]}" \
		"${plain[@]}" --save "$rows"
	within "gpu tests" 200 $python -m pytest -q "${gpu[@]}"
	within "kernels bf16 compiled" 90 "${bench[@]}" kernels --n "${n[0]}" --dtype bfloat16 \
		"${wide[@]}" "${first[@]}" --save "$rows"
	within "step small compiled" 90 "${bench[@]}" step "${small[@]}" "${queue[@]}" "${times[@]}" \
		"${compiled[@]}" --save "$rows"
	within "step ResNet-50 compiled" 150 "${bench[@]}" step "${large[@]}" "${queue[@]}" \
		"${times[@]}" "${compiled[@]}" --save "$rows"
	clock_end
}

pictures() { # COUNT SIZE: makes square images and prints their folder
	$python -c "
import sys
from PIL import Image
from pathlib import Path
folder, count, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
folder.mkdir(exist_ok=True)
picture = Image.merge('RGB', [Image.effect_noise((size, size), sigma) for sigma in (9, 19, 29)])
for i in range(count):
    picture.rotate(10 * i).save(folder / f'{i}.jpg')
" "$OUT/images" "$1" "$2"
	echo "$OUT/images"
}

part_second() {
	local tune=($mocofast bench autotune --c 128 --types bf16 --kinds queue)
	local some=(--candidates 20) two=(--candidates 2 --specialised) test=(-m gpu)
	local photos device=(--device cuda) loaders=(--repeats 3 --seconds 1)
	if [ -n "${DRY:-}" ]; then
		tune+=(--static) some=(--candidates 2) test=(-k "rule_s or need_the_barriers")
		photos=$(pictures 32 64) device=(--device cpu) loaders=(--repeats 1 --batches 1 --batch-size 4)
	else
		# Noise stands for photos where no archive is at hand.
		photos=$(unpack imagenet-sample-500.tar) || photos=$(pictures 500 500)
	fi
	clock_start 240
	within "autotune" 85 "${tune[@]}" "${some[@]}" --out "$OUT/tiles.json"
	within "loaders" 70 $mocofast bench data "$photos" "${device[@]}" "${loaders[@]}" --save "$rows"
	within "specialised sweep" 40 $python -m pytest -q -p no:cacheprovider "${test[@]}" "$specialised"
	within "autotune specialised" 45 "${tune[@]}" "${two[@]}" --out "$OUT/specialised.json"
	clock_end
}

part_cifar() {
	# 50 epochs of CIFAR-10. MoCo's authors publish a kNN of 73.3 % after 50 of their 200 epochs.
	local run=(--train.epochs 50 --knn.every 10 --model.queue_dtype bfloat16) photos
	clock_start 300
	if [ -n "${DRY:-}" ]; then
		run=(--train.max_steps 2 --data.batch_size 8 --model.arch resnet_tiny --model.queue_size 64)
		photos=$(pictures 32 64)
	else
		photos=$(unpack cifar10-jpeg.tar.xz) || return 1
	fi
	within "CIFAR-10" 290 $mocofast pretrain cifar10_r18 --data.source folder --data.loader device \
		--data.path "$photos" --train.dir "$OUT/cifar10_short" "${run[@]}"
	clock_end
}

all="env gpu_tests kernel_tests checkers kernels step loops data train accuracy autotune sweep"
for part in "${@:-$all}"; do
	for name in $part; do
		echo "== $name"
		"part_$name" 2>&1 | tee "$OUT/$name.log"
		echo "== $name ended with ${PIPESTATUS[0]}"
	done
done
