"""Jobs of cluster engines: their files, a submission, and runs that stop, continue and end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import yaml
from mocofast_bench.processes import on_ranks

from mocofast import cli, interrupts, settings
from mocofast.launch import slurm
from mocofast.launch.job import ENGINES
from tests.drills.elastic import children

GOLDEN = Path(__file__).parent / "launch"  # one file an engine, looked at by a person
WORDS = (
    *("moco_v2_r50_200ep", "--data.path", "/data/image net", "--nodes", "4"),
    *("--image", "example.org/mocofast:1", "--volume", "data:/data", "--memory", "512Gi"),
    *("--setup", "source env/bin/activate", "--flags", "--partition=gpu --qos=low"),
)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Runs a command in this process. Returns exit status, stdout and stderr."""
    try:
        status = cli.main(arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def program(folder: Path, name: str, text: str) -> None:
    """Writes a program of bash that takes the place of a command of an engine."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize("engine", ENGINES)
def test_files_of_engines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.chdir("/")
    if engine == "slurm":
        pytest.importorskip("submitit")
    status, out, _ = call(capsys, "launch", engine, *WORDS, "--dry-run")
    assert status == 0
    assert out == (GOLDEN / f"job{ENGINES[engine].suffix}.txt").read_text(encoding="utf-8")


def test_documents_hold_what_engines_read(capsys: pytest.CaptureFixture[str]) -> None:
    job = yaml.safe_load(call(capsys, "launch", "k8s", *WORDS, "--dry-run")[1])
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {name: replica["replicas"] for name, replica in replicas.items()} == {
        "Master": 1,
        "Worker": 3,
    }
    container = replicas["Worker"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {
        "cpu": "64",
        "nvidia.com/gpu": "8",
        "memory": "512Gi",
    }
    assert (
        subprocess.run(["bash", "-n", "-c", container["command"][2]], check=False).returncode == 0
    )
    task = yaml.safe_load(call(capsys, "launch", "sky", *WORDS, "--dry-run")[1])
    assert task["num_nodes"] == 4
    assert task["resources"]["memory"] == "512+"
    assert subprocess.run(["bash", "-n", "-c", task["run"]], check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("lsf",), "lsf"),
        (("slurm", "digit"), "did you mean 'digits'"),
        (("slurm", "digits", "--optim.lrr", "1"), "did you mean '--optim.lr'"),
        (("slurm", "digits", "--node", "1"), "--node"),
        (("slurm", "digits", "--nodes", "0"), "at least 1"),
        (("slurm", "digits", "--nodes", "3", "--gpus", "1"), "not divisible among 3"),
        (("slurm", "digits", "--gpus", "1", "--processes", "2"), "--processes"),
        (("slurm", "digits", "--name", "A_b"), "--name"),
        (("slurm", "digits", "--resume", "runs/x"), "--resume auto alone"),
        (("slurm", "digits", '--flags=--comment="open'), "--flags: No closing quotation"),
        (("slurm", "digits", "--flags=-p gpu"), "expected options such as --partition=gpu"),
        (("slurm", "digits", "--time", "1 day"), "--time: expected a value such as 24:00:00"),
        (("sky", "digits", "--memory", "lots"), "--memory: expected a value such as 64G"),
        (("k8s", "digits"), "--image"),
        (("k8s", "digits", "--image", "x", "--volume", "data"), "CLAIM:FOLDER"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str) -> None:
    status, out, error = call(capsys, "launch", *words, "--dry-run")
    assert status == 2
    assert said in error
    assert out == ""


def test_quotes_memory_and_dollars_as_the_engine_reads_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("digits", "--gpus", "0", "--dry-run", "--flags", '--comment="a b"')
    words += ("--memory", "1536Mi", "--image", "x", "--setup", "echo $$")
    script, task, manifest = (call(capsys, "launch", e, *words)[1] for e in ("slurm", "sky", "k8s"))
    assert "#SBATCH --comment='a b'\n" in script and "#SBATCH --mem=1536M\n" in script
    assert yaml.safe_load(task)["resources"]["memory"] == "2+"
    pod = yaml.safe_load(manifest)["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"cpu": "8", "memory": "1536Mi"}
    assert pod["containers"][0]["command"][2].startswith("echo $$$$\n")


def test_submits_with_the_command_of_the_engine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, error = call(capsys, "launch", "k8s", "digits", "--image", "x")
    assert status == 2 and "digits.k8s.yaml is written" in error
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program(tmp_path, "kubectl", 'echo "$@" > said; exit 3')
    assert call(capsys, "launch", "k8s", "digits", "--image", "x")[0] == 3
    assert (tmp_path / "said").read_text() == "apply -f digits.k8s.yaml\n"
    Path("digits.k8s.yaml").write_text("of a person")
    status, _, error = call(capsys, "launch", "k8s", "digits", "--image", "x")
    assert status == 2 and "did not write" in error
    assert Path("digits.k8s.yaml").read_text() == "of a person"


RUN = ("digits", "--gpus", "0", "--processes", "2", "--cpus", "1", "--train.epochs", "3")


def lines(folder: Path) -> list[dict[str, object]]:
    """Returns the metrics of a run without its times."""
    times = ("images_per_second", "data_wait", "memory_gib", "seconds")
    found = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    return [{k: v for k, v in line.items() if not k.startswith(times)} for line in found]


def wait_until(done: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def never_stopped(words: list[str], rank: int) -> None:
    assert cli.main(words) == 0


def path_of_packages() -> str:
    root = Path(cli.__file__).parents[1]
    return f"{root}:{root / 'kernels'}:{root / 'benchmarks'}"


SHORT = (*RUN, "--train.log_every", "1", "--knn.start", "false")


def ends_as_if_never_stopped(folder: Path) -> None:
    words = ["pretrain", "digits", *SHORT[7:], "--train.dir", str(folder / "runs/whole")]
    on_ranks(partial(never_stopped, words))
    assert lines(folder / "runs/job") == lines(folder / "runs/whole")


def test_a_slurm_job_is_warned_requeued_and_ends_as_if_never_stopped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """SLURM's commands are short programs here. submitit, ranks, signals and statuses are real."""
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    program(tmp_path, "scontrol", 'echo "$@" > asked')
    # Starts the ranks. The first job warns the ranks, as SLURM does before the end of its time.
    program(
        tmp_path,
        "srun",
        r"""while [ ! -x "$1" ]; do
    [ "$1" = --output ] && log=${2//%j/$SLURM_JOB_ID}
    shift
done
pids=()
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" >> "${log//%t/$rank}" 2>&1 & pids+=($!)
done
if [ ! -e warned ]; then
    touch warned
    until [ -s runs/job/metrics.jsonl ] && grep -q '"loss"' runs/job/metrics.jsonl; do
        kill -0 "${pids[0]}" || break
        sleep .05
    done
    kill -USR2 "${pids[@]}"
fi
for pid in "${pids[@]}"; do
    wait "$pid"; statuses+=($?)
done
echo "${statuses[@]}" >> statuses
exit $((statuses[0] > statuses[1] ? statuses[0] : statuses[1]))
""",
    )
    program(
        tmp_path,
        "sbatch",
        r"""export SLURM_JOB_ID=4711 SLURM_JOB_NODELIST=localhost SLURM_NTASKS=2
(
    bash "$1"
    while [ -e asked ]; do cat asked >> requests; rm asked; bash "$1"; done
    touch ended
) > batch.log 2>&1 &
echo "Submitted batch job 4711"
""",
    )
    monkeypatch.setenv("PYTHONPATH", path_of_packages())
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    status, out, _ = call(capsys, "launch", "slurm", *SHORT, "--name", "job")
    assert status == 0 and out.startswith("job 4711: ")
    wait_until((tmp_path / "ended").exists)
    logs = [(tmp_path / f"job.slurm/4711_{rank}_log.out").read_text() for rank in (0, 1)]
    # submitit ends rank 0 with -1 after its request for the next job.
    assert (tmp_path / "statuses").read_text() == "255 75\n0 0\n", logs
    assert (tmp_path / "requests").read_text() == "requeue 4711\n"
    assert "continuing at step" in logs[0] and "global_rank=1(2)" in logs[1]
    ends_as_if_never_stopped(tmp_path)


@pytest.mark.slow
def test_a_local_job_of_submitit_is_requeued_and_ends_as_if_never_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    submitit = pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", path_of_packages())
    executor = submitit.AutoExecutor(tmp_path / "job.slurm", cluster="local")
    executor.update_parameters(tasks_per_node=2, timeout_min=20)
    words = ("digits", *SHORT[7:], "--train.dir", "runs/job", "--resume", "auto")
    job = executor.submit(slurm.Rank(words))
    metrics = tmp_path / "runs/job/metrics.jsonl"
    wait_until(lambda: metrics.exists() and '"loss"' in metrics.read_text())
    for rank in children(job._process.pid):
        os.kill(rank, signal.SIGUSR2)
    assert job.results() == [None, None], job.stderr()
    assert "continuing at step" in job.task(0).stdout()
    assert "Requeued job" in job.task(0).stdout()
    ends_as_if_never_stopped(tmp_path)


@pytest.mark.parametrize(
    ("number", "status", "rank", "asked"),
    [
        (signal.SIGUSR1, 75, 0, "submitit"),
        (signal.SIGUSR2, 128 + signal.SIGUSR2, 0, "submitit"),  # while modules load
        (signal.SIGTERM, 75, 0, "requeue incomplete 4711\n"),
        (signal.SIGUSR2, 75, 1, ""),
        (signal.SIGTERM, 75, 1, ""),
        (signal.SIGUSR2, 76, 0, ""),  # the run diverged
        (None, 0, 0, ""),
    ],
)
def test_rank_0_alone_asks_for_the_next_job_and_only_once(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    number: int | None,
    status: int,
    rank: int,
    asked: str,
) -> None:
    pytest.importorskip("submitit")
    program(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/asked')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("MASTER_PORT", "20000")
    job = {"JOB_ID": "4711", "NTASKS": "2", "PROCID": str(rank), "JOB_NODELIST": "gpu[07-08]"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    seen = {}

    def pretrain(words: tuple[str, ...]) -> int:
        seen.update({name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")})
        with pytest.raises(interrupts.Stopped) if number else contextlib.nullcontext():
            signal.raise_signal(number or 0)
        return status

    monkeypatch.setattr(slurm, "_pretrain", pretrain)
    submitits = signal.signal(
        signal.SIGUSR2, lambda *_: (tmp_path / "asked").write_text("submitit")
    )
    try:
        ends = pytest.raises(SystemExit, match=str(status)) if status else contextlib.nullcontext()
        with mock.patch.dict(os.environ), ends:  # the rank sets RANK and the like
            slurm.Rank(("digits",))()
    finally:
        signal.signal(signal.SIGUSR2, submitits)
    assert seen == {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "gpu07"}
    found = tmp_path / "asked"
    assert (found.read_text() if found.exists() else "") == asked


@pytest.mark.parametrize(
    ("time", "minutes"),
    [("90", 90), ("90:30", 91), ("24:00:00", 1440), ("2-00", 2880), ("1-12:30", 2190)],
)
def test_times_of_slurm_in_minutes(time: str, minutes: int) -> None:
    assert slurm._minutes(time) == minutes


def test_what_sbatch_refuses_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ("launch", "slurm", "digits", "--gpus", "1")
    status, _, error = call(capsys, *words)
    assert status == 2 and "sbatch: no such command on this machine" in error
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.defpath}")
    program(tmp_path, "sbatch", "echo 'invalid partition: gpu' >&2; exit 1")
    status, _, error = call(capsys, *words)
    assert status == 2 and "sbatch: invalid partition: gpu" in error
    (tmp_path / "file").touch()
    status, _, error = call(capsys, *words, "--out", "file")
    assert status == 2 and "--out: file is a file, expected a folder" in error


@pytest.mark.slow
def test_ray_starts_the_ranks_again_after_a_death(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{path_of_packages()}:{tmp_path}")
    # Rank 1 dies once, after the first checkpoint.
    words = ["launch", "ray", *RUN, "--name", "job", "--restarts", "2"]
    words += ["--checkpoint.every_steps", "11"]
    plugin = tmp_path / "dying_encoder.py"
    plugin.write_text(
        "import os, pathlib\n"
        "from mocofast.models.encoders import TinyResNet as build\n"
        "def encoder(**options):\n"
        "    model = build(**options)\n"
        "    def count(*_):\n"
        "        saved = list(pathlib.Path('runs/job/checkpoints').glob('step_*.pt'))\n"
        "        mark = pathlib.Path(__file__).with_name('died')\n"
        "        if saved and os.environ.get('RANK') == '1' and not mark.exists():\n"
        "            mark.touch()\n"
        "            os._exit(9)\n"
        "    model.register_forward_pre_hook(count)\n"
        "    return model\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mocofast", *words, "--model.arch", "dying_encoder:encoder"],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "died").exists()
    assert lines(tmp_path / "runs/job")[-1]["epoch"] == 3
    assert "continuing at step" in (tmp_path / "runs/job/train.log").read_text()


def test_recipes_of_clusters_have_names_for_every_engine() -> None:
    from mocofast.launch.job import checked
    from mocofast.launch.request import LaunchConfig

    for recipe in settings.recipes():
        config = settings.load_recipe(recipe)
        assert "_" not in checked(LaunchConfig(gpus=1), [], config).options.name
