"""The launcher's environment as a value."""

from __future__ import annotations

import pytest

from sdxl_distill.errors import ConfigError
from sdxl_distill.runtime.world import World


def test_plain_python_is_a_world_of_one() -> None:
    assert World.from_environment({}) == World(0, 1, 0, 1)
    assert World.from_environment({}).is_main


def test_torchruns_variables_are_read() -> None:
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    world = World.from_environment(environment)
    assert world == World(5, 8, 1, 4)
    assert not world.is_main


def test_the_processes_of_a_node_share_its_cores(monkeypatch) -> None:
    monkeypatch.setattr("sdxl_distill.runtime.world.available_cores", lambda: 12)
    assert World(5, 8, 1, 4).num_cores == 3
    assert World(5, 32, 1, 16).num_cores == 1


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1"}, {"RANK": "one"}, {"WORLD_SIZE": ""}],
)
def test_contradictions_are_configuration_errors(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="launcher"):
        World.from_environment(environment)
