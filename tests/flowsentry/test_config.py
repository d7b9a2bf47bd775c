from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from flowsentry.config import FamilyName, InferenceConfig, PipelineConfig, ReplayConfig, Section, TrainConfig, load
from flowsentry.errors import ConfigError
from flowsentry.learning.families import FAMILIES
from flowsentry.learning.search import Metric as SearchMetric
from flowsentry.learning.selection import METRICS
from flowsentry.monitoring.pace import Pace

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS: dict[str, type[PipelineConfig]] = {"inference": InferenceConfig, "replay": ReplayConfig}
"""Of the files that are not for the pipeline train."""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "given.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def complaint(folder: Path, text: str | bytes, model: type[BaseModel] = TrainConfig) -> str:
    path = write(folder, text)
    with pytest.raises(ConfigError) as caught:
        load(path, model)
    message = str(caught.value)
    assert all(line.startswith(str(path)) for line in message.splitlines())
    return message.replace(str(path), "given.yaml")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_file_in_configs_loads(path: Path) -> None:
    assert isinstance(load(path, MODELS.get(path.stem, TrainConfig)), PipelineConfig)


@pytest.mark.parametrize("name", MODELS)
def test_the_other_default_files_show_every_key_with_its_default(name: str) -> None:
    written = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert load(CONFIGS / f"{name}.yaml", MODELS[name]) == MODELS[name]()
    assert written == MODELS[name]().model_dump(mode="json") | {"data": "simulate"}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_production_is_not_shown_the_simulated_flows_of_its_training(name: str, tmp_path: Path) -> None:
    config = load(write(tmp_path, "simulation: {minutes: 60}\n"), MODELS[name])
    assert config.simulation.minutes == 60
    assert config.simulation.seed == MODELS[name]().simulation.seed != TrainConfig().simulation.seed
    assert load(write(tmp_path, "simulation: {seed: 7}\n"), MODELS[name]).simulation.seed == 7


@pytest.mark.parametrize("speed", ["1x", "10x", "0.5x", "max"])
def test_a_speed_is_what_the_command_takes(speed: str, tmp_path: Path) -> None:
    assert load(write(tmp_path, f"speed: {speed}\n"), ReplayConfig).speed == speed
    assert str(Pace.parse(speed)) == speed


@pytest.mark.parametrize("speed", ["study", "0x", "-1x", "10", "''"])
def test_what_is_no_speed_is_named(speed: str, tmp_path: Path) -> None:
    assert complaint(tmp_path, f"speed: {speed}\n", ReplayConfig).startswith("given.yaml:1: speed ")


def test_the_default_file_shows_every_key_with_its_default() -> None:
    written = yaml.safe_load((CONFIGS / "train.yaml").read_text())
    assert load(CONFIGS / "train.yaml", TrainConfig) == TrainConfig()
    expected = TrainConfig().model_dump(mode="json")
    expected["data"] = "simulate"
    assert written == expected


def test_names_are_those_of_the_parts_that_they_name() -> None:
    assert get_args(FamilyName) == tuple(FAMILIES)
    section = TrainConfig.model_fields
    assert get_args(type(section["search"].default).model_fields["metric"].annotation) == get_args(SearchMetric)
    assert get_args(type(section["select"].default).model_fields["metric"].annotation) == METRICS


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    config = load(write(tmp_path, "search: {folds: 5}\n"), TrainConfig)
    assert config.search.folds == 5
    assert config.search.metric == TrainConfig().search.metric
    assert config.simulated


@pytest.mark.parametrize(
    ("text", "data"),
    [("flows.csv", ["flows.csv"]), ("[a.csv, 'b/*.gz']", ["a.csv", "b/*.gz"]), ("simulate", ["simulate"])],
)
def test_data_is_one_name_or_a_list(tmp_path: Path, text: str, data: list[str]) -> None:
    config = load(write(tmp_path, f"data: {text}\n"), TrainConfig)
    assert config.data == data
    assert config.simulated == (data == ["simulate"])


def test_the_view_paper_is_trained_with_every_family_but_effects(tmp_path: Path) -> None:
    everything = load(write(tmp_path, "view: behaviour\n"), TrainConfig).families
    assert load(write(tmp_path, "view: paper\n"), TrainConfig).families == [f for f in everything if f != "effects"]
    assert "effects" in everything


def test_a_config_survives_json() -> None:
    config = TrainConfig()
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("veiw: paper\n", "given.yaml:1: veiw is no key of this file; did you mean view?"),
        (
            "labels: corrected\nsearch:\n  fold: 3\n",
            "given.yaml:3: search.fold is no key of this file; did you mean search.folds?",
        ),
        ("folds: 3\n", "given.yaml:1: folds is no key of this file; it belongs under search"),
        (
            "search:\n  target_fpr: 0.1\n",
            "given.yaml:2: search.target_fpr is no key of this file; it belongs under limit",
        ),
        (
            "limit:\n  families: [svc]\n",
            "given.yaml:2: limit.families is no key of this file; it belongs at the top level",
        ),
        ("target_fprs: 0.1\n", "given.yaml:1: target_fprs is no key of this file; did you mean limit.target_fpr?"),
        (
            "limit: {xyzzy: 1}\n",
            "given.yaml:1: limit.xyzzy is no key of this file; known here: target_fpr, minimum_effect",
        ),
        (
            "simulation:\n  seeds: 1\n",
            "given.yaml:2: simulation.seeds is no key of this file; did you mean simulation.seed?",
        ),
        ("search:\n  folds: three\n", "given.yaml:2: search.folds should be a whole number, not 'three' (text)"),
        ("search:\n  folds: 3.5\n", "given.yaml:2: search.folds should be a whole number, not 3.5"),
        ("limit:\n  minimum_effect: 1\n", "given.yaml:2: limit.minimum_effect should be true or false, not 1"),
        ("limit:\n  target_fpr: '0.1'\n", "given.yaml:2: limit.target_fpr should be a number, not '0.1' (text)"),
        ("limit:\n  target_fpr: .nan\n", "given.yaml:2: limit.target_fpr should be a finite number, not nan"),
        ("limit:\n  target_fpr: 0\n", "given.yaml:2: limit.target_fpr should be greater than 0, not 0"),
        (
            "view: papre\n",
            "given.yaml:1: view should be one of behaviour, paper, not 'papre' (text); did you mean paper?",
        ),
        ("families: [svc, knn, tree]\n", "given.yaml:1: families[2] should be one of"),
        ("families: [svc, svc]\n", "given.yaml:1: families names svc more than once"),
        (
            "view: paper\nfamilies: [svc, effects]\n",
            "given.yaml:2: families should leave effects out: the view paper states no minimum effects",
        ),
        (
            "splits: {rotations: 4}\n",
            "given.yaml:1: splits.rotations should be less than or equal to 3, not 4",
        ),
        ("families: []\n", "given.yaml:1: families should not be empty"),
        ("search: 3\n", "given.yaml:1: search should hold keys with values, not 3"),
        ("search:\n", "given.yaml:1: search should hold keys with values, not None (nothing)"),
        ("data: 3\n", "given.yaml:1: data should be simulate or a list of files, folders or globs, not 3"),
        ("data: []\n", "given.yaml:1: data should be simulate or a list of files"),
        ("data: [simulate, a.csv]\n", "given.yaml:1: data should be either simulate or a list of files, not both"),
        ("view: paper\nlabels: published\nview: paper\n", "given.yaml:3: view is given twice, first in line 1"),
        ("view: &v paper\nlabels: *v\n", "given.yaml:1: anchors and aliases are not supported"),
        ("view: &v [*v]\n", "given.yaml:1: anchors and aliases are not supported"),
        ("1: 2\n", "given.yaml:1: keys should be plain words"),
        ("view: [paper\n", "given.yaml:2: is no valid YAML"),
        ("a: b: c\n", "given.yaml:1: is no valid YAML"),
        ("view: !!python/object/apply:os.system ['true']\n", "given.yaml:1: is no valid YAML"),
        ("view: 2022-02-25\n", "given.yaml:1: view should be one of behaviour, paper, not '2022-02-25' (text)"),
        ("view: !!timestamp 9999-99-99\n", "given.yaml: is no valid YAML"),
        ("", "given.yaml: should hold keys with values"),
        ("- view\n", "given.yaml: should hold keys with values"),
        ("just words\n", "given.yaml: should hold keys with values"),
        ("---\nview: paper\n---\nview: paper\n", "given.yaml:3: is no valid YAML"),
        (b"view: \xff\n", "given.yaml: byte 7 is not UTF-8 text"),
        (b"view: \x00\n", "given.yaml: is no valid YAML"),
        ("[" * 100_000, "given.yaml: is no valid YAML: nested too deeply"),
        ("#" * (1 << 20) + "#", "given.yaml: is larger than 1 MiB"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_remedy(tmp_path: Path, text: str | bytes, expected: str) -> None:
    message = complaint(tmp_path, text)
    assert message.startswith(expected)
    assert "\n" not in message


def test_each_mistake_has_its_line(tmp_path: Path) -> None:
    message = complaint(tmp_path, "veiw: paper\nsearch:\n  fold: 3\n")
    assert [re.split(": | is", line)[1] for line in message.splitlines()] == ["veiw", "search.fold"]


def test_keys_within_lists_and_mappings_are_known_too(tmp_path: Path) -> None:
    class Part(Section):
        name: str

    class Whole(Section):
        parts: dict[str, list[Part]]

    message = complaint(tmp_path, "parts:\n  left:\n    - nmae: x\n", Whole)
    assert message.splitlines() == [
        "given.yaml:3: parts.left[0].name is missing",
        "given.yaml:3: parts.left[0].nmae is no key of this file; did you mean parts.left[0].name?",
    ]


@pytest.mark.parametrize(("number", "value"), [("1e-3", 0.001), ("1.5E-2", 0.015), ("0.25", 0.25)])
def test_numbers_may_have_exponents(tmp_path: Path, number: str, value: float) -> None:
    assert load(write(tmp_path, f"limit: {{target_fpr: {number}}}\n"), TrainConfig).limit.target_fpr == value


def test_a_missing_file_names_its_nearest_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "")
    with pytest.raises(ConfigError, match=r"givn\.yaml: there is no such file; did you mean .*given\.yaml\?"):
        load(tmp_path / "givn.yaml", TrainConfig)


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path, TrainConfig)
