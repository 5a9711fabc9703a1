"""Options: names, types, valid values, and the messages about wrong options."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest
import yaml

from mocofast import settings
from mocofast.config import Config, method_options
from mocofast.methods.build import build_method
from mocofast.settings import ConfigError


def test_every_option_has_a_meaning_and_its_default_passes_its_own_type() -> None:
    for group, kind in settings.groups().items():
        for setting in settings.settings(group, kind):
            assert len(setting.help) > 10
            assert settings.coerce(setting, setting.default) == setting.default
            if setting.default != "":
                assert settings.coerce(setting, settings.shown(setting.default)) == setting.default


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("optim.lr", "1e-4", 1e-4),  # YAML 1.1 reads this as a string
        ("model.mlp", "true", True),
        ("model.mlp", "no", False),
        ("augment.crop_scale", "0.08,1", (0.08, 1.0)),
        ("augment.crop_scale", "[0.08, 1.0]", (0.08, 1.0)),
        ("optim.milestones", "3,5,8", (3, 5, 8)),
        ("optim.milestones", "", ()),
        ("data.path", "no", "no"),  # a folder, not a truth value
        ("train.epochs", "7", 7),
    ],
)
def test_text_becomes_a_value_of_the_options_type(name: str, text: str, value: object) -> None:
    config = Config()
    settings.apply(config, {name: text})
    group, key = name.split(".")
    assert getattr(getattr(config, group), key) == value


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("optim.lrr", "1", "did you mean 'optim.lr'"),
        ("optim.lr", "fast", "expected float, got 'fast'"),
        ("optim.lr", "nan", "expected float"),
        ("train.epochs", "1.5", "expected int"),
        ("train.epochs", True, "expected int"),
        ("model.mlp", "perhaps", "expected bool"),
        ("augment.crop_scale", "0.1", "2 values like (0.2, 1.0)"),
        ("data.loader", "daly", "did you mean 'dali'"),
        ("data.path", 3, "expected text in UTF-8"),
    ],
)
def test_a_wrong_option_names_itself_and_sets_nothing(name: str, value: object, said: str) -> None:
    config = Config()
    with pytest.raises(ConfigError) as error:
        settings.apply(config, {"train.seed": "5", name: value})
    assert said in str(error.value)
    assert name in str(error.value)
    assert config == Config()


def test_a_configuration_survives_its_own_file() -> None:
    config = settings.load_recipe("cifar10_r18")
    assert settings.from_dict(settings.to_dict(config)) == config


def test_recipes_hold_only_differences_and_are_valid() -> None:
    for name in settings.recipes():
        values = yaml.safe_load(
            (resources.files("mocofast") / "recipes" / f"{name}.yaml").read_text()
        )
        options = method_options(values.get("model", {}).get("method", "moco"))
        default = settings.to_dict(Config(model=options()))
        for group, content in values.items():
            for key, value in content.items():
                same = default[group][key] == value
                # moco_v1_r50 differs in nothing, and states values to show where the recipe stands.
                assert not same or name == "moco_v1_r50", (
                    f"{name}: {group}.{key} is the default already"
                )
        config = settings.load_recipe(name)
        config.data.path = config.data.path or "images"
        settings.validate(config)


def test_the_published_settings_are_in_the_recipes() -> None:
    """Settings of the MoCo papers, and of the CIFAR-10 demo of MoCo's authors."""
    v1 = settings.load_recipe("moco_v1_r50")
    assert (v1.model.temperature, v1.model.mlp, v1.optim.schedule, v1.optim.milestones) == (
        0.07,
        False,
        "step",
        (120, 160),
    )
    assert (v1.augment.jitter, v1.augment.jitter_p, v1.augment.gray_first) == (
        (0.4, 0.4, 0.4, 0.4),
        1.0,
        True,
    )
    assert (v1.optim.lr, v1.optim.momentum, v1.optim.weight_decay, v1.data.batch_size) == (
        0.03,
        0.9,
        1e-4,
        256,
    )
    v2 = settings.load_recipe("moco_v2_r50_200ep")
    assert (v2.model.temperature, v2.model.mlp, v2.optim.schedule, v2.train.epochs) == (
        0.2,
        True,
        "cosine",
        200,
    )
    assert (v2.augment.jitter, v2.augment.jitter_p, v2.augment.blur, v2.augment.blur_sigma) == (
        (0.4, 0.4, 0.4, 0.1),
        0.8,
        0.5,
        (0.1, 2.0),
    )
    assert not v2.augment.gray_first
    long = settings.load_recipe("moco_v2_r50_800ep")
    assert long.train.epochs == 800
    long.train.epochs, long.recipe = 200, v2.recipe
    assert long == v2
    demo = settings.load_recipe("cifar10_r18")
    assert (
        demo.model.queue_size,
        demo.model.momentum,
        demo.model.temperature,
        demo.model.bn_splits,
    ) == (
        4096,
        0.99,
        0.1,
        8,
    )
    assert (demo.optim.lr, demo.optim.weight_decay, demo.data.batch_size) == (0.06, 5e-4, 512)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.temperature", 0.0),
        ("model.momentum", 1.5),
        ("data.batch_size", 0),
        ("augment.crop_scale", (0.5, 0.2)),
        ("augment.gray", 1.2),
        ("augment.blur_2", -0.5),
        ("optim.betas", (0.9, 1.0)),
        ("augment.jitter", (0.4, 0.4, 0.4, 0.6)),
        ("train.log_every", 0),
        ("knn.k", 0),
    ],
)
def test_senseless_numbers_are_refused_by_name(name: str, value: object) -> None:
    config = settings.load_recipe("digits")
    settings.apply(config, {name: value})
    with pytest.raises(ConfigError, match=name):
        settings.validate(config)


def test_batches_must_divide_into_micro_batches() -> None:
    config = settings.load_recipe("digits")
    config.train.accumulate = 3
    with pytest.raises(ConfigError, match="multiple of train"):
        settings.validate(config)


def test_a_folder_needs_a_path() -> None:
    with pytest.raises(ConfigError, match=r"data\.path"):
        settings.validate(settings.load_recipe("moco_v1_r50"))


def test_unknown_recipes_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        settings.load_recipe("digit")


@pytest.mark.parametrize("text", ["model: 3", "modle: {dim: 3}", "model: {dim: [", "- 1"])
def test_a_malformed_recipe_file_is_a_config_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        settings.load_recipe(str(path))


def test_options_of_another_method_are_left_out_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = Config()
    settings.apply(config, {"model.method": "byol", "model.queue_size": 5, "model.mlp": False})
    assert not hasattr(config.model, "queue_size")
    (record,) = caplog.records
    assert re.fullmatch(
        r"model.queue_size is an option of moco, .*memory_bank, .*; byol ignores it", record.message
    )  # mlp has its default, as in the configuration of an old run
    with pytest.raises(ConfigError, match=r"unknown option 'model\.queue'"):
        settings.apply(config, {"model.queue": 5})


def test_a_change_of_the_method_keeps_what_was_set_and_takes_its_own_defaults() -> None:
    config = Config()
    settings.apply(config, {"model.temperature": 0.3, "model.dim": 32})
    settings.apply(config, {"model.method": "swav"})
    assert (config.model.method, config.model.temperature, config.model.dim) == ("swav", 0.3, 32)
    assert config.model.hidden_dim == 2048  # of SwAV, not of BYOL
    assert settings.from_dict(settings.to_dict(config)) == config
    other = Config()
    settings.apply(other, {"model.method": "simclr"})
    assert other.model.temperature == 0.1


def test_a_method_that_was_set_without_its_options_is_refused() -> None:
    config = settings.load_recipe("digits")
    config.model.method = "byol"
    for use in (settings.validate, build_method):
        with pytest.raises(ConfigError, match=r"mocofast\.settings\.apply"):
            use(config)


def test_values_out_of_range_are_named_before_values_together() -> None:
    config = settings.load_recipe("digits")
    settings.apply(config, {"train.accumulate": 0})
    with pytest.raises(ConfigError, match=r"train\.accumulate: expected at least 1, got 0"):
        settings.validate(config)
    settings.apply(config, {"train.accumulate": 3})
    with pytest.raises(ConfigError, match=r"data\.batch_size: expected a multiple"):
        settings.validate(config)
