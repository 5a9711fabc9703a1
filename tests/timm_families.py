"""Drill: one step, checkpoint, load and export of the smallest model of every family of timm.

    python tests/timm_families.py --results FILE [--write docs/encoders.md] [--minutes 14]

A second run with the same FILE continues: models whose result is in FILE are left out.

A family is a module of timm and the first word of a model's name. The smallest model has the fewest
parameters. Models run on a CPU, each in a process of its own, with a time limit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import re
import tempfile
import textwrap
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SIDES = (64, 0)  # sides of the images to try, in pixels; 0: as timm's settings of the model say
BATCH = 2
STAGES = ("build", "step", "load", "export")


def families() -> dict[str, list[str]]:
    """Returns the models of every family, {module/word: names}."""
    import timm

    found: dict[str, list[str]] = {}
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            word = re.match("[a-z]+", name)
            found.setdefault(f"{module}/{word[0] if word else name}", []).append(name)
    return found


def smallest(names: Iterable[str]) -> str:
    """Returns the model with the fewest parameters."""
    import timm
    import torch

    sizes = {}
    for name in names:
        with torch.device("meta"):
            try:
                model = timm.create_model(name)
            except Exception:  # some models compute numbers when they are built
                continue
        sizes[name] = sum(p.numel() for p in model.parameters())
    return min(sizes, key=lambda name: sizes[name]) if sizes else next(iter(names))


def drill(name: str, folder: Path) -> dict[str, Any]:
    """Trains one step of MoCo with a model of timm, saves, loads and exports the encoder.

    Returns the name, the side of the images, the stage that failed or "", the error, the seconds,
    the number of trained tensors without a gradient, and whether the loaded features are equal in
    bits.
    """
    import timm
    import torch

    from mocofast import settings
    from mocofast.config import ConfigError
    from mocofast.evaluate.features import evaluating
    from mocofast.interop.export import export
    from mocofast.interop.reference_checkpoints import as_checkpoint, load_any
    from mocofast.methods.build import build_method
    from mocofast.models.encoders import features
    from mocofast.train.checkpoint import FORMAT
    from mocofast.train.checkpoint_writer import save_atomically
    from mocofast.train.optimizer import optimizer_of
    from mocofast.train.step import train_step

    began = time.perf_counter()
    result: dict[str, Any] = {"name": name, "stage": "", "error": "", "equal": False}
    stage = "build"
    try:
        config = settings.load_recipe("moco_v1_r50")
        config.model.arch = f"timm/{name}"
        config.model.dim, config.model.queue_size = 16, 32
        config.optim.lr = 1e-6  # gradients of untrained models on two images reach 1e6
        for side in SIDES:
            config.augment.size = side or timm.get_pretrained_cfg(name).input_size[-1]
            torch.manual_seed(0)
            try:
                method = build_method(config)
                break
            except ConfigError as error:
                if not side or "cannot take images" not in str(error):
                    raise
        result["side"] = config.augment.size
        stage = "step"
        optimizer = optimizer_of(method, config.optim)
        view = torch.randn(BATCH, 3, config.augment.size, config.augment.size)
        off = torch.autocast("cpu", enabled=False)
        metrics = train_step(method, (view, view.flip(3)), optimizer, 1, off)
        trained = [p for p in method.encoder_q.parameters() if p.requires_grad]
        result["unused"] = sum(p.grad is None for p in trained)
        assert metrics.values.isfinite().all(), "the loss is not finite"
        assert result["unused"] < len(trained), "no weight has a gradient"
        stage = "load"
        path = folder / f"{name}.pt"
        state = {"format": FORMAT, "config": settings.to_dict(config), "epoch": 1}
        save_atomically({**state, "model": method.state_dict()}, path)
        with evaluating(method), torch.no_grad():
            expected = features(method.encoder_q, view)
        assert expected.isfinite().all(), "the features are not finite after the step"
        loaded = load_any(str(path))
        again = loaded.method.eval()
        read = again.state_dict()
        for key, value in method.state_dict().items():
            assert torch.equal(read[key], value), f"{key} differs"
        with torch.no_grad():
            found = features(again.encoder_q, view)
        result["equal"] = torch.equal(found, expected)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        stage = "export"
        written = export(as_checkpoint(loaded), "timm", folder / f"{name}.backbone.pt")
        scope: dict[str, Any] = {}
        exec(written.how_to_load, scope)
        with torch.no_grad():
            theirs = scope["model"].eval()(view)
        torch.testing.assert_close(theirs.flatten(), expected.flatten(), rtol=1e-5, atol=1e-5)
        stage = ""
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    for path in folder.glob(f"{name}.*"):
        path.unlink()
    return {**result, "stage": stage, "seconds": round(time.perf_counter() - began, 1)}


def drill_all(names: Iterable[str], seconds: float, deadline: float) -> Iterator[dict[str, Any]]:
    """Yields the results of models, each in a fork. A model that takes longer than `seconds` fails.

    deadline: time.monotonic() after which no further model begins.
    """
    import mocofast.interop.reference_checkpoints  # noqa: F401 (once, before the forks)

    forks = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            failed = {"name": name, "equal": False}
            if time.monotonic() > deadline:
                yield {**failed, "stage": "not run", "error": "no time was left"}
                continue
            receive, send = forks.Pipe(duplex=False)
            process = forks.Process(target=_drill_into, args=(name, Path(folder), send))
            process.start()
            send.close()
            try:
                late = {**failed, "stage": "time", "error": f"more than {seconds:.0f} s"}
                result = receive.recv() if receive.poll(seconds) else late
            except EOFError:
                result = {**failed, "stage": "build", "error": "the process died"}
            process.kill()
            process.join()
            yield result


def _drill_into(name: str, folder: Path, send: Any) -> None:
    send.send(drill(name, folder))


def page(results: Iterable[dict[str, Any]], models: int) -> str:
    """Returns docs/encoders.md. models: number of models of all families."""
    import timm
    import torch

    found = list({result["name"]: result for result in results}.values())
    ran = [r for r in found if r["stage"] not in ("not run", "time")]
    trained = [r for r in ran if r["stage"] not in ("build", "step")]
    equal, exported = [r for r in ran if r["equal"]], [r for r in ran if not r["stage"]]
    unused = sum(bool(r.get("unused")) for r in trained)
    wrong = [r for r in found if r["stage"] not in ("", "not run")]
    rows = [f"| `{r['name']}` | {r['stage']} | {r['error'][:90]} |" for r in wrong]
    left = ", ".join(f"`{r['name']}`" for r in found if r["stage"] == "not run") or "none"
    left = textwrap.fill(f"Not run, because no time was left: {left}.", 98)
    where = f"timm {timm.__version__}, torch {torch.__version__.partition('+')[0]}, a CPU"
    date = datetime.date.today()
    return "\n".join(
        [
            PAGE.strip(),
            "",
            "## Drill of timm's families",
            "",
            f"{where}, {date}. This command writes the page:",
            "`python tests/timm_families.py --results FILE --write docs/encoders.md`",
            "",
            f"Models that are the smallest of a family: {models}. Models that ran within the time "
            f"limit: {len(ran)}.",
            "Of these models:",
            "",
            "| | models | share |",
            "|---|---|---|",
            f"| train a step | {len(trained)} | {len(trained) / len(ran):.1%} |",
            f"| load with equal bits and equal features | {len(equal)} | "
            f"{len(equal) / len(ran):.1%} |",
            f"| export to timm, equal to 1e-5 | {len(exported)} | {len(exported) / len(ran):.1%} |",
            f"| have weights without a gradient (several ranks refuse these models) | {unused} | "
            f"{unused / len(ran):.1%} |",
            "",
            left,
            "",
            "What failed:",
            "",
            "| model | stage | error |",
            "|---|---|---|",
            *(rows or ["| none | | |"]),
            "",
            NOTES.strip(),
            "",
        ]
    )


PAGE = """
# Encoders

| `--model.arch` | encoders |
|---|---|
| `resnet50`, `resnext50_32x4d`, ... | ResNets of torchvision, `_cifar` for small images |
| `vit_b_16`, `vit_l_16`, ... | ViTs of torchvision |
| `vit_tiny`, `vit_small`, `vit_base`, `vit_large`, `vit_huge` | MoCo v3: frozen patch projection |
| `resnet18_solo_cifar`, ... | as `_cifar`, with solo-learn's stem, which pads two pixels |
| `vit_tiny_cifar`, `vit_micro_cifar`, `resnet_tiny` | small encoders |
| `timm/NAME`, `timm/NAME:pretrained` | models of timm, untrained or with weights of timm |
| `package.module:function`, `package.module` | an encoder of yours ([extend.md](extend.md)) |

`--model.drop_path` and `--model.layer_scale` are options of ViTs and of models of timm. Momentum
encoders use all residual branches. `--engine.checkpoint_activations` trades time for memory.
`timm/NAME:pretrained` reads timm's weights at the start of a run, from the Hugging Face cache on
the disk or by a download. Checkpoints of the run need timm's file no more.

Heads are found by name (`fc`, `head`, `heads`, `classifier`) or as timm names heads. Features are
the input of the head, with maps and tokens averaged. Models with two heads of equal width
(distilled models) give the mean of the two inputs. CrossViT gives the inputs in a row.
"""


NOTES = """
The drill trains at a rate of 1e-6. On two images the gradients of some untrained models reach 1e4
to 1e6, also in a plain loop on timm's own model. A step at MoCo's rate of .03 then leaves features
of NaN (`convmixer_768_32`, `efficientvim_m1`). In runs with larger batches `--optim.clip_norm` or
`--optim.warmup_epochs` helps. VOLO's auxiliary head for patches does not count:
the features are the class token, timm's `pre_logits`. `deepseek_vit_412m`, the largest model, takes
431 s on a core, with images of 546 pixels, and needs `--seconds 600`.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=40, help="limit of a model")
    parser.add_argument("--minutes", type=float, default=14, help="limit of all models")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, which grow")
    parser.add_argument("--only", nargs="*", help="models, instead of all families")
    parser.add_argument("--write", type=Path, help="the page to write, from all results")
    given = parser.parse_args()
    known = families()
    if given.only is None:
        given.only = [smallest(known[family]) for family in sorted(known)]
    chosen = dict.fromkeys(given.only)
    with open(given.results, "a+", encoding="utf-8") as file:
        file.seek(0)
        results = [json.loads(line) for line in file]
        done = {result["name"] for result in results if result["stage"] not in ("not run", "time")}
        deadline = time.monotonic() + 60 * given.minutes
        left = [name for name in chosen if name not in done]
        for result in drill_all(left, given.seconds, deadline):
            results.append(result)
            file.write(json.dumps(result) + "\n")
            file.flush()
    if given.write:
        text = page(results, len(chosen))
        given.write.write_text(text, encoding="utf-8")
