"""Continues a run with more images: the step is counted in the epochs of the present images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mocofast.config import ConfigError

if TYPE_CHECKING:
    from mocofast.train.checkpoint import RunState


def take_other_images(state: RunState, saved: dict[str, Any], extend: bool) -> list[str]:
    """Changes the content of a checkpoint, in place, to fit a run of other images.

    state: of the run that continues, before anything is restored.
    saved: the epoch and the step within the epoch stay, the step gets another number. Files that
        could not be read are forgotten, because files have other numbers.
    extend: allow other images, as many as before or more.
    Returns lines for the log, none for the same images. Raises ConfigError for other images without
    `extend`, for fewer images, and for a method that keeps something for every image or class.
    """
    found, expected = state.source.fingerprint(), saved["data"]["fingerprint"]
    if found == expected:
        return []
    if not extend:
        raise ConfigError(
            "data.path: these are not the images of the run to continue (fingerprint "
            f"{found}, not {expected}), so the run would see other batches. --extend continues "
            "with as many images or more"
        )
    before, count = saved["step"], len(state.source)
    step = state.pace.before(saved["epoch"]) + saved["step_in_epoch"]
    if step < before:
        raise ConfigError(
            f"data.path: --extend continues with as many images or more, and an epoch of these "
            f"{count} images has fewer steps than before; --init starts a new run from the weights"
        )
    own, old = state.model.state_dict(), saved["model"]
    wrong = [name for name in own.keys() & old.keys() if own[name].shape != old[name].shape]
    if wrong:
        raise ConfigError(
            f"data.path: {state.config.model.method} holds {wrong[0]} for every image or class of "
            "the run to continue; --init starts a new run from the weights"
        )
    saved["step"], saved["data"]["skipped"] = step, {}
    images = saved.get("sizes", {}).get("images", "other")
    return [
        f"continuing with {count} images instead of {images}: step {before} counts as step {step}, "
        f"of epochs of {state.pace.steps(saved['epoch'])} steps"
    ]
