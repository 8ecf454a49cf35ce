"""`--set a.b.c=value`: how it is read and where it lands."""

from __future__ import annotations

import pytest

from sdxl_distill.config.override import Override
from sdxl_distill.errors import ConfigError


def _apply(argument: str, tree: object) -> object:
    override = Override.parse(argument)
    override.apply(tree, override.value)
    return tree


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("3", 3),
        ("true", True),
        ("null", None),
        ('"3"', "3"),
        ("[[64, 32],]", [[64, 32]]),
        ("{a: 1}", {"a": 1}),
        ("./cache/latents", "./cache/latents"),
        ("two words", "two words"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_a_value_is_json_or_else_text(text, value):
    assert Override.parse(f"key={text}").value == value


def test_objects_on_the_way_are_made():
    assert _apply("a.b.c=1", {}) == {"a": {"b": {"c": 1}}}


def test_null_on_the_way_is_replaced_by_an_object():
    assert _apply("a.b=1", {"a": None}) == {"a": {"b": 1}}


@pytest.mark.parametrize("argument", ["a.1.w=5", "a[1].w=5"])
def test_a_list_position_is_a_number(argument):
    assert _apply(argument, {"a": [{}, {"w": 1}]}) == {"a": [{}, {"w": 5}]}


@pytest.mark.parametrize("argument", ["a.2=5", "a.-1=5", "a.x=5", "a.²=5", "a.2.w=5"])
def test_a_place_outside_a_list_is_refused(argument):
    with pytest.raises(ConfigError, match="not a position in a; expected a number below 2"):
        _apply(argument, {"a": [1, 2]})


def test_a_path_through_a_scalar_is_refused():
    with pytest.raises(ConfigError, match=r"--set device\.x=1: device is not an object"):
        _apply("device.x=1", {"device": "cpu"})


def test_a_file_that_is_no_object_is_refused():
    with pytest.raises(ConfigError, match="the file is not an object"):
        _apply("a=1", 3)


@pytest.mark.parametrize("argument", ["", "a", "=1", "a..b=1", ".a=1"])
def test_an_argument_that_is_no_assignment_is_refused(argument):
    with pytest.raises(ConfigError, match="a path, an equals sign and a value"):
        Override.parse(argument)


def test_a_value_with_a_key_given_twice_is_refused():
    with pytest.raises(ConfigError, match="b is given more than once"):
        _apply("a={b: 1, b: 2}", {})
