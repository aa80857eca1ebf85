from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from serve_apps.generate import Args, build

CONFIG = Path(__file__).parents[2] / "serve_apps" / "generate.yaml"


def bound_args(args: Args) -> Args:
    (bound,) = build(args)._bound_deployment.init_args
    return bound


def test_the_defaults_are_the_shipped_model_on_actors() -> None:
    args = bound_args(Args())
    assert (args.model, args.model_name, args.runtime, args.seed) == ("tiny", "tiny", "ray", 0)


def test_command_line_strings_become_numbers() -> None:
    assert Args.model_validate({"devices": "3", "seed": "7"}) == Args(devices=3, seed=7)


@pytest.mark.parametrize(
    "wrong",
    [
        {"modle": "tiny"},
        {"devices": 0},
        {"runtime": "threads"},
        {"devices": 2, "topology": "home.yaml"},
        {"planner": "even", "placement": "p.yaml"},
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Args.model_validate(wrong)


def test_paths_are_the_callers_and_the_model_is_named_by_its_last_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets").mkdir()
    (tmp_path / "home.yaml").touch()
    monkeypatch.chdir(tmp_path)
    args = bound_args(Args(model="nets/", topology="home.yaml", placement="/elsewhere/p.yaml"))
    assert (args.model, args.model_name) == (str(tmp_path / "nets"), "nets")
    assert (args.topology, args.placement) == (str(tmp_path / "home.yaml"), "/elsewhere/p.yaml")
    assert bound_args(Args(model="nets", model_name="mine")).model_name == "mine"


def test_only_a_replica_that_computes_asks_for_a_cpu() -> None:
    cpus = {
        runtime: build(Args(runtime=runtime))._bound_deployment.ray_actor_options["num_cpus"]
        for runtime in ("local", "process", "ray")
    }
    assert cpus == {"local": 1, "process": 1, "ray": 0}


def test_the_config_file_is_one_that_serve_and_args_accept() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "serve_apps.generate:build"
    assert Args.model_validate(application.args).model == "tiny"


def test_every_argument_is_shown_in_the_config_file() -> None:
    text = CONFIG.read_text(encoding="utf-8")
    assert [name for name in Args.model_fields if f"{name}:" not in text] == []


def test_a_store_that_cannot_be_written_is_refused_before_anything_is_deployed(tmp_path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match="checkpoint store"):
        Args(checkpoints=str(tmp_path / "file" / "store"))
    assert Args(checkpoints=str(tmp_path / "store")).checkpoints
