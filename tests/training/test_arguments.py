"""Settings: the paper's defaults, TRL's parser, and one line for each that cannot be meant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from deepalign.errors import UserError
from deepalign.losses import TokenStrength
from deepalign.training.arguments import ConstrainedSFTConfig

YAML = """
model_name_or_path: some/model
dataset_name: some/data
use_peft: true
beta_first: 0.25
beta_rest: 1e-3
num_early: 3
weight_floor: 1e-3
reduction: sequence_mean
reference: precomputed
reference_cache: kept
head: trl
group_weights: [0.2, 0.8]
learning_rate: 2e-5
use_cpu: true
bf16: false
output_dir: {folder}
"""


def config(tmp_path: Path, **changes: Any) -> ConstrainedSFTConfig:
    return ConstrainedSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **changes)


def test_the_defaults_are_the_papers(tmp_path: Path) -> None:
    args = config(tmp_path)
    assert args.strength == TokenStrength() == TokenStrength(first=0.5, early=2.0, rest=0.1, num_early=5)
    assert (args.objective, args.weight_floor, args.reduction) == ("constrained", 0.0, "token")
    assert (args.warmup_steps, args.adam_beta1) == (10, 0.5)


def test_all_else_is_as_in_trl(tmp_path: Path) -> None:
    """What differs is the two settings that the constraint needs."""
    plain = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    args = config(tmp_path)
    shared = set(plain.__dataclass_fields__) & set(args.__dataclass_fields__)
    differing = {name for name in shared if getattr(plain, name, None) != getattr(args, name, None)}
    assert differing - {"logging_dir", "distributed_state"} == {"warmup_steps", "adam_beta1"}


def test_trls_parser_reads_a_yaml_file_and_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(YAML.format(folder=tmp_path / "out"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["sft.py", "--config", str(file), "--beta_early", "3.5", "--num_early", "4"])
    parser = TrlParser((ScriptArguments, ConstrainedSFTConfig, ModelConfig))
    script, args, model = parser.parse_args_and_config()
    assert isinstance(args, ConstrainedSFTConfig)
    assert args.strength == TokenStrength(first=0.25, early=3.5, rest=1e-3, num_early=4)
    assert (args.weight_floor, args.reduction, args.reference, args.head) == (
        1e-3,
        "sequence_mean",
        "precomputed",
        "trl",
    )
    assert (args.reference_cache, args.group_weights, args.learning_rate) == ("kept", [0.2, 0.8], 2e-5)
    assert (script.dataset_name, model.model_name_or_path, model.use_peft) == ("some/data", "some/model", True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": "dpo"}, "objective='dpo' is unknown; choose from constrained, sft"),
        ({"reduction": "mean"}, "reduction='mean' is unknown; choose from token, sequence_sum, sequence_mean"),
        ({"reference": "cached"}, "reference='cached' is unknown; choose from auto, online, precomputed"),
        ({"head": "liger"}, "head='liger' is unknown; choose from auto, one-pass, trl"),
        ({"beta_first": 0.0}, r"beta_first is 0\.0; a strength is a positive number"),
        ({"beta_early": -2.0}, r"beta_early is -2\.0"),
        ({"beta_rest": float("nan")}, "beta_rest is nan"),
        ({"beta_rest": float("inf")}, "beta_rest is inf"),
        ({"num_early": -1}, "num_early is -1; give 0 or more"),
        ({"weight_floor": -0.1}, r"weight_floor=-0\.1 is outside \[0, 2\)"),
        ({"weight_floor": 2.0}, r"weight_floor=2\.0 is outside"),
        ({"weight_floor": float("nan")}, "weight_floor=nan is outside"),
        ({"group_weights": [0.5, -1.0]}, r"group_weights=\[0\.5, -1\.0\]: give numbers from 0 up"),
        ({"group_weights": [float("nan")]}, "group_weights="),
        ({"loss_type": "dft"}, "loss_type='dft' weighs tokens in its own way"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"packing": True, "packing_strategy": "wrapped"}, "packing_strategy='wrapped'"),
        ({"packing": True, "group_weights": [1.0]}, "packing keeps no column of groups"),
    ],
)
def test_what_cannot_be_meant_costs_one_line(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as told:
        config(tmp_path, **changes)
    message = str(told.value)
    assert "\n" not in message
    assert "beta_num" not in message
