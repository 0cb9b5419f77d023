"""Configurations: what the files of weights may hold, and what is refused."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from official import SMALL
from safetensors import safe_open

from minimti.config import MODELS, RECIPES, MicroConditioning, checked, from_json, is_word, to_json

TINY_FILE = Path(__file__).parents[1] / "weights" / "tiny" / "tiny.safetensors"
DEFAULTS = ("recipe", "note")


def entries_of(config) -> dict:
    return json.loads(to_json(config))


def in_version_0_1_0(config) -> dict:
    """As a file of version 0.1.0 holds it: no defaults of its own, and the image encoder's older name."""
    entries = {name: value for name, value in entries_of(config).items() if name not in DEFAULTS}
    entries["clip"] = entries.pop("image_encoder")
    return entries


def test_the_named_models():
    assert list(MODELS) == ["svd", "svd-xt", "svd-xt-1-1", "tiny"]
    assert all(checked(config).name == name for name, config in MODELS.items())
    assert [(c.num_frames, c.num_steps) for c in MODELS.values()] == [(14, 25), (25, 30), (25, 30), (14, 12)]
    assert [c.recipe for c in MODELS.values()] == ["paper"] * 3 + ["muon"]
    assert MODELS["svd-xt-1-1"].unet == MODELS["svd-xt"].unet == MODELS["svd"].unet
    assert [bool(c.note) for c in MODELS.values()] == [False, False, False, True]


def test_names_need_no_heavy_import():
    """The command lines build their help from this module alone."""
    code = "import sys, minimti.config; assert not {'torch', 'av', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("config", [*MODELS.values(), SMALL])
def test_a_configuration_survives_json(config):
    assert from_json(to_json(config)) == config


def test_files_of_version_0_1_0_get_the_defaults_of_the_model_of_their_name():
    for name, config in MODELS.items():
        assert from_json(json.dumps(in_version_0_1_0(config))) == config, name
    other = replace(MODELS["tiny"], name="mine", recipe="paper", note="", num_iterations=77)
    assert from_json(json.dumps(in_version_0_1_0(other))) == other  # a name that is none: the defaults of svd


def test_the_embedded_model_is_read():
    with safe_open(TINY_FILE, framework="pt") as file:
        assert from_json(file.metadata()["config"]) == MODELS["tiny"]


@pytest.mark.parametrize("write", [entries_of, in_version_0_1_0])
def test_nothing_else_is_optional(write):
    entries = write(SMALL)
    for name in entries:
        with pytest.raises(TypeError, match="missing or unknown fields"):
            from_json(json.dumps({key: value for key, value in entries.items() if key != name}))
        for inner in entries[name] if isinstance(entries[name], dict) else ():
            part = {key: value for key, value in entries[name].items() if key != inner}
            with pytest.raises(TypeError, match=f"missing or unknown fields: {inner}"):
                from_json(json.dumps(entries | {name: part}))
    with pytest.raises(TypeError, match="SVDConfig has missing or unknown fields: colour"):
        from_json(json.dumps(entries | {"colour": 3}))


@pytest.mark.parametrize("text", ["", "not json", "[]", "3", "null", '{"clip": 3}', '{"clip": {}, "name": []}'])
def test_other_texts_are_refused(text):
    with pytest.raises((ValueError, TypeError)):
        from_json(text)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    "field, values",
    [
        ("name", (3, None, ["svd"])),
        ("num_frames", (-3, "4", None, True, 4.5, NAN, INF, [4])),
        ("size", (64, [64], [64, 64, 64], ["64", "64"], [64.0, 64], [True, 64], [-64, 64], [[64], 64], "64")),
        ("sigma_min", (-0.1, "0.1", None, False, NAN, INF, [0.1])),
        ("p_mean", ("0", None, NAN, INF, -INF, True)),
        ("recipe", ("adam", None, 3, "")),
        ("note", (None, 3)),
        ("micro", (None, 3, [], {})),
        ("unet", ("unet", [1, 2])),
    ],
)
def test_wrong_values_are_refused(field, values):
    for value in values:
        with pytest.raises(TypeError):
            from_json(json.dumps(entries_of(SMALL) | {field: value}))


@pytest.mark.parametrize("value", [["1"], ["1", "2"], [1, True], [1, 2.0], [[1]], 4, "12", None, [1, -2], [1, None]])
def test_wrong_values_inside_a_network_are_refused(value):
    entries = entries_of(SMALL)
    with pytest.raises(TypeError, match="channel_mult is "):
        from_json(json.dumps(entries | {"unet": entries["unet"] | {"channel_mult": value}}))


@pytest.mark.parametrize(
    "part, field, values",
    [
        ("image_encoder", "layers", (10**9, 10**6, 65, 0, 10**400)),
        ("unet", "num_res_blocks", (10**9, 10**5, 9, 0)),
        ("unet", "channel_mult", ([1] * 9, [10**9], [0])),
        ("unet", "model_channels", (10**9, 0)),
        ("vae", "ch_mult", ([1] * 10**4, [65])),
        ("vae", "scale_factor", (0, 1e300)),
        ("micro", "fps_id", (10**30, 1000)),
        ("micro", "cond_aug", (10**400, 101)),
        ("", "num_frames", (10**9, 0)),
        ("", "size", ([10**9, 64], [4097, 64])),
        ("", "sigma_max", (1e300, 0)),
        ("", "p_mean", (-11, 11)),
        ("", "num_iterations", (10**7,)),
        ("", "note", ("a" * 501, "\x1b[2J", "two\nlines")),
    ],
)
def test_numbers_beyond_any_model_are_refused_at_once(part, field, values):
    for value in values:
        entries = entries_of(SMALL)
        (entries[part] if part else entries)[field] = value
        began = time.perf_counter()
        with pytest.raises(TypeError, match=f"{field} is ") as caught:
            from_json(json.dumps(entries))
        assert time.perf_counter() - began < 1 and len(str(caught.value)) < 200


def test_the_largest_numbers_are_allowed():
    for changes in ({"num_frames": 1000}, {"size": (4096, 4096)}, {"p_mean": -10.0}, {"note": "a" * 500}):
        assert from_json(to_json(replace(SMALL, **changes))) == replace(SMALL, **changes)


NAMES = ("svd", "a", "A-b_c.d", "a" * 64, "7")
NO_NAMES = (
    "",
    "/../../../x",
    "../x",
    "a/b",
    "a" * 65,
    ".",
    ".hidden",
    "-o",
    "_",
    "a b",
    "a\n",
    "\n",
    "ä",
    "a\0",
    3,
    None,
    (),
)


def test_the_name_of_a_model_is_a_word():
    """It becomes a part of the names of files."""
    for name in NAMES:
        assert is_word(name) and from_json(to_json(replace(SMALL, name=name))).name == name
    for name in NO_NAMES:
        assert not is_word(name)
        with pytest.raises(TypeError, match="name is "):
            checked(replace(SMALL, name=name))


def test_a_text_nested_too_deeply_is_refused():
    with pytest.raises(ValueError, match="nested too deeply"):
        from_json("[" * 10**6)


def test_a_dataclass_that_fits_is_passed_on():
    micro = MicroConditioning(fps_id=6, motion_bucket_id=127, cond_aug=0)  # a whole number is a float too
    assert checked(micro) is micro
    for recipe in RECIPES:
        config = replace(SMALL, recipe=recipe, p_mean=-2.8)
        assert checked(config) is config and from_json(to_json(config)) == config
    for wrong in (
        replace(SMALL, size=[64, 64]),
        replace(SMALL, unet=asdict(SMALL.unet)),
        replace(SMALL, unet=SMALL.vae),
        replace(SMALL, unet=replace(SMALL.unet, channel_mult=("1",))),
    ):
        with pytest.raises(TypeError):
            checked(wrong)
