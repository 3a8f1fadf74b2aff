"""Constrained fine-tuning from a file of settings: `python -m deepalign.training --config FILE [--SETTING VALUE ...]`.

The settings are those of `ConstrainedSFTConfig` and of TRL's `ScriptArguments` and `ModelConfig`; the command line wins
over the file. `accelerate launch -m` and `torchrun -m` start it on several devices as it is. A run that was stopped
goes on from its last whole checkpoint when it is started again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepalign.errors import UserError, first_line
from deepalign.training.checkpoints import is_whole, last_checkpoint

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Suffixes of data files, with the loader of `datasets` that reads them."""


def main(arguments: list[str] | None = None) -> int:
    """Train; returns the exit status."""
    _quiet_libraries()
    try:
        train(arguments)
    except UserError as error:
        _tell(" ".join(str(error).splitlines()))
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        _tell("stopped; the same command goes on from the last checkpoint")
        return EXIT_INTERRUPTED
    return 0


def train(arguments: list[str] | None = None) -> None:
    """Read the settings, train, and save the model in `output_dir`.

    Raises:
        UserError: A setting, the data or the model cannot be used; one line with the remedy.
    """
    with _mistakes_in_one_line():
        script, args, model = parse(arguments)
        checkpoint = chosen_checkpoint(args.output_dir, args.resume_from_checkpoint)
        trainer = build(script, args, model)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    trainer.end()


def parse(arguments: list[str] | None = None) -> tuple[Any, Any, Any]:
    """The settings of the data, of training and of the model.

    Raises:
        UserError: The file or a setting cannot be read.
    """
    try:
        from trl import ModelConfig, ScriptArguments, TrlParser
    except ImportError as error:
        raise UserError(f"training needs more packages ({error}); pip install 'deepalign[train]'") from error
    import yaml  # type: ignore[import-untyped]

    from deepalign.training.arguments import ConstrainedSFTConfig

    class Parser(TrlParser):  # type: ignore[misc]
        """TRL's, without the pages of usage that `argparse` puts before an error."""

        def error(self, message: str) -> None:
            raise UserError(message)

    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[-1:] == ["--config"]:
        raise UserError("--config needs a file")
    parser = Parser((ScriptArguments, ConstrainedSFTConfig, ModelConfig), prog="python -m deepalign.training")
    try:
        script, args, model = parser.parse_args_and_config(arguments)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {error.filename}; --config takes a YAML file of settings") from error
    except yaml.YAMLError as error:
        raise UserError(f"the settings are no YAML: {' '.join(str(error).split())}") from error
    except TypeError as error:
        # Values from a file come as YAML reads them, a list where a number belongs among them.
        raise UserError(f"a setting has a value of another kind: {first_line(error)}") from error
    return script, args, model


def build(script: Any, args: Any, model: Any) -> Any:
    """The trainer of a run.

    Raises:
        UserError: There is no model or no data of that name.
    """
    from trl import get_peft_config, get_quantization_config

    from deepalign.training.trainer import ConstrainedSFTTrainer

    name = model.model_name_or_path
    if name is None:
        raise UserError("model_name_or_path is missing; give a hub id or a folder")
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise UserError(f"there is no folder {name}; model_name_or_path takes a hub id or a folder")
    evaluates = args.eval_strategy != "no"
    splits = [script.dataset_train_split, *([script.dataset_test_split] if evaluates else [])]
    data = load_rows(script.dataset_name, splits, config=script.dataset_config, streams=script.dataset_streaming)
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "use_safetensors": True,
        **(args.model_init_kwargs or {}),
    }
    return ConstrainedSFTTrainer(
        name,
        args,
        train_dataset=data[0],
        eval_dataset=data[1] if evaluates else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


def load_rows(name: str | None, splits: list[str], *, config: str | None = None, streams: bool = False) -> list[Any]:
    """Splits of a data set: of a file (JSONL, JSON, CSV or Parquet), a folder or a hub id.

    Args:
        name: A file is one split, whatever it is called.
        splits: Which are wanted.
        config: Which configuration of a hub data set.
        streams: Whether rows are read as they are needed.

    Raises:
        UserError: There is no such data or no such split, or it cannot be read.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    if not name:
        raise UserError("dataset_name is missing; give a file, a folder or a hub id")
    kind = FILE_KINDS.get(Path(name).suffix.lower())
    if kind and not Path(name).is_file():
        raise UserError(f"there is no file {name}; dataset_name takes a file, a folder or a hub id")
    if kind and not Path(name).stat().st_size:
        raise UserError(f"{name} is empty")
    if kind and len(splits) > 1:
        raise UserError(f"{name} has no split for evaluation; put train and test files in a folder and give the folder")
    try:
        if kind:
            found = {splits[0]: load_dataset(kind, data_files=name, split="train", streaming=streams)}
        else:
            found = load_dataset(name, name=config, streaming=streams)
    except DatasetsError as error:
        raise UserError(f"{name} cannot be read: {first_line(error.__cause__ or error)}") from error
    for split in splits:
        if split not in found:
            raise UserError(f"{name} has no split {split!r}; there are {', '.join(found)}")
        if not streams and not len(found[split]):
            raise UserError(f"{name} has no rows in its split {split!r}")
    return [found[split] for split in splits]


def chosen_checkpoint(folder: str, wanted: str | None = None) -> str | None:
    """The checkpoint to go on from: the one that is wanted, or the last whole one in a folder; None to begin anew.

    Args:
        folder: Of the run.
        wanted: Path of a checkpoint; "false" begins anew.

    Raises:
        UserError: The one that is wanted is no checkpoint.
    """
    if wanted is None or wanted.lower() == "true":
        return last_checkpoint(Path(folder))
    if wanted.lower() == "false":
        return None
    if not is_whole(Path(wanted)):
        raise UserError(f"resume_from_checkpoint={wanted} is no whole checkpoint; leave it out to take the last one")
    return wanted


@contextlib.contextmanager
def _mistakes_in_one_line() -> Iterator[None]:
    """Other libraries' words for a setting, a model or data that cannot be used, as a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise UserError(first_line(error)) from error


def _quiet_libraries() -> None:
    """Keep what nobody can act on off the terminal; set before the libraries are imported."""
    for name, value in {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
        os.environ.setdefault(name, value)
    # It tells of kernels that it could also have.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _tell(line: str) -> None:
    rank = os.environ.get("RANK", "0")
    sys.stderr.write(f"deepalign.training{'' if rank == '0' else f', process {rank}'}: {line}\n")


if __name__ == "__main__":
    sys.exit(main())
