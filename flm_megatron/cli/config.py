"""Show every field of the run file with its type, default and meaning, or a run file resolved.

With --from-hf, print a run file whose first stage is the model of a Hugging Face folder and starts from its weights.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from flm_megatron.cli.options.output import add_json, print_json
from flm_megatron.cli.options.parser import path
from flm_megatron.json_text import Json

if TYPE_CHECKING:
    from flm_megatron.config.fields import Field


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm config`; with a run file, `--field value` overrides it as in `flm train`."""
    parser.add_argument(
        "run_file", type=path, nargs="?", help="run file (YAML) to show with every field; without one, all fields"
    )
    parser.add_argument("--field", metavar="PATH", help="show only this field or section, such as stages.parallel")
    parser.add_argument(
        "--from-hf", metavar="DIR", type=path, help="print a run file that starts from this Hugging Face folder"
    )
    add_json(parser)
    parser.epilog = (
        "With a run file, any field can be overridden: --stages.0.parallel.tensor 2. The rules of the run file and of "
        "its growths are checked, and exit status 2 lists what breaks them; data, tokenizers and checkpoints need not "
        "be on this machine, so `flm train` alone says whether they are there. (`model: from_checkpoint` is read.)"
    )
    parser.set_defaults(accepts_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Print the fields or the resolved run."""
    if args.from_hf:
        found = _from_folder(args)
        print_json(found) if args.json else print(_yaml(found), end="")
    elif args.run_file:
        found = _resolved(args)
        print_json(found) if args.json else print(_yaml(found).removesuffix("...\n"), end="")  # after a single value
    elif args.json:
        print_json({"fields": [vars(field) for field in _chosen_fields(args)]})
    else:
        print(_fields(args), end="")
    return 0


def _yaml(data: Json) -> str:
    from flm_megatron.config.yaml_text import format_yaml

    return format_yaml(data)


def _from_folder(args: argparse.Namespace) -> Json:
    """A run file of a folder's model."""
    from flm_megatron.checkpoint.hugging_face.run_file import run_file_of_folder
    from flm_megatron.errors import RequestError

    if args.run_file or args.field or args.overrides:
        raise RequestError("--from-hf stands alone: override the fields of the run file that it prints")
    return run_file_of_folder(args.from_hf)


def _fields(args: argparse.Namespace) -> str:
    """One block for each field: path, type and default, then its help text."""
    blocks = [_block(f.path, f.type, f.default, f.help) for f in _chosen_fields(args)]
    return "\n".join(blocks if args.field else [*blocks, _merged_keys()])


def _chosen_fields(args: argparse.Namespace) -> list[Field]:
    """The fields that are asked for."""
    from flm_megatron.config.fields import all_fields
    from flm_megatron.config.messages import nearest
    from flm_megatron.errors import RequestError

    if args.overrides:
        raise RequestError(f"{' '.join(args.overrides)}: overrides need a run file")
    wanted = _without_indices(args.field)
    found = [f for f in all_fields() if not wanted or f.path == wanted or f.path.startswith(f"{wanted}.")]
    if not found:
        raise RequestError(f"--field {args.field}: no such field, {nearest(wanted, [f.path for f in all_fields()])}")
    return found


def _merged_keys() -> str:
    """The two keys that stand for fields, and are gone once a run file is resolved."""
    from flm_megatron.config.presets import preset_names

    return (
        "stages.preset  (text)\n    A stage to start from, whose fields this stage's own keys replace: "
        f"{', '.join(preset_names())}.\n\n"
        "defaults  (section)\n    Fields of a stage, merged under every stage and under its preset.\n"
    )


def _block(path: str, type_words: str, default: object, text: str) -> str:
    from flm_megatron.config.yaml_text import format_yaml

    shown = format_yaml([default], flow=True).strip()[1:-1] if default != "" else ""
    about = f"{type_words}; {shown}" if shown else type_words
    return f"{path}  ({about})\n    {' '.join(text.split())}\n"


def _without_indices(path: str | None) -> str:
    return ".".join(part for part in (path or "").split(".") if not part.isdigit())


def _resolved(args: argparse.Namespace) -> Json:
    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.config.loader import run_to_dict
    from flm_megatron.growth.foreseen import check_run_file

    config = open_run(args.run_file, args.overrides)
    check_run_file(config)
    data = run_to_dict(config)
    return _picked(data, args.field.split(".")) if args.field else data


def _picked(data: Json, keys: list[str]) -> Json:
    """What a path leads to; through a list without an index or name, that of each element."""
    from flm_megatron.config.overrides import element_index
    from flm_megatron.errors import RequestError

    if not keys:
        return data
    key, rest = keys[0], keys[1:]
    if isinstance(data, dict) and key in data:
        return _picked(data[key], rest)
    if isinstance(data, list):
        index = element_index(data, key)
        return [_picked(item, keys) for item in data] if index is None else _picked(data[index], rest)
    known = f"known here: {', '.join(data)}" if isinstance(data, dict) else f"{data!r} has no parts"
    raise RequestError(f"--field: {key!r} leads nowhere, {known}")
