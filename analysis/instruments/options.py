"""Settings as dataclasses, and their fields as options of a command line."""
import argparse
from collections.abc import Sequence
from dataclasses import field, fields

from rstitch_hf.command import template_option, usable_device


def option(default, text: str):
    """A field of a config, with its help on the command line."""
    return field(default=default, metadata={"help": text})


def add_options(parser: argparse.ArgumentParser, config, what: str = "", unread: Sequence[str] = (),
                **others) -> None:
    """An argument for each field of a config but those that the command does not look at; left out it is
    None. `others`: defaults of another config, to tell of beside the first."""
    for f in fields(config):
        if f.name in unread:
            continue
        default = f"{f.default}" * (f.default not in ("", None,
                                                      ())) + "".join(f", {name} {getattr(other, f.name)}"
                                                                     for name, other in others.items()
                                                                     if getattr(other, f.name) != f.default)
        kind = {"device": dict(type=usable_device),
                "dtype": dict(choices=["float32", "bfloat16", "float16"]),
                "template": dict(type=template_option, action="append", metavar="KEY=VALUE"),
                "system": dict(type=str), "instruction": dict(type=str)}.get(
            f.name, dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type))
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=None,
                            help=f"{what}{f.metadata['help']}" + f" (default: {default})" * bool(default),
                            **kind)


def given(args: argparse.Namespace, config) -> dict:
    """The fields of a config that the command line names."""
    named = {f.name: value for f in fields(config) if (value := getattr(args, f.name, None)) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in named.items()}
