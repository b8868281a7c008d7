"""A run file: the options of a command by their long names, in TOML. The command line wins over it."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin, get_type_hints

import typer

from mtdp_runtime.errors import UsageError
from mtdp_runtime.settings import HUB
from mtdp_runtime.urls import is_url, path_or_url

_NOT_HERE: Final = ("config", "verify", "version")  # they say what the command itself does
_SLIDES: Final = "slides"


def _read(ctx: typer.Context, path: Path | None) -> Path | None:
    """Let the file stand where the command line says nothing. Runs before the other options are looked at."""
    if path is not None:
        ctx.default_map = options_in(path, ctx.command)
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        metavar="TOML",
        help="Read options from this file, each by its long name: mpp = 0.5, and slides = [...] for SLIDE. Its paths "
        "start at its own folder. An option on the command line replaces the file's.",
        callback=_read,
        is_eager=True,
        rich_help_panel="What is worked on",
    ),
]


def options_in(path: Path, command: Any) -> dict[str, Any]:
    """Return the values of a run file, as a command line would have them, by the parameters of the command's function.

    Args:
        path: of the file.
        command: the command-line library's.

    Raises:
        UsageError: it cannot be read, names what is no option, or a value has another type.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows puts a mark before the text
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read: {error.strerror}", hint="A run file is TOML: check the path."
        ) from error
    except (ValueError, RecursionError) as error:  # brackets without end
        raise UsageError(f"{path}: is not TOML: {error}", hint='For example: slides = ["slides"], mpp = 0.5') from error
    known = {long: (name, type_) for name, (long, type_) in _options(command).items() if long not in _NOT_HERE}
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            near = get_close_matches(key.replace("_", "-").lower(), known, 1)
            hint = f"Did you mean {near[0]}?" if near else f"Options that a file may have: {', '.join(sorted(known))}."
            raise UsageError(f"{path}: {key}: no option has this name", hint=hint)
        name, type_ = known[key]
        values[name] = _value(path, key, value, type_)
    return values


def slides_of(ctx: typer.Context) -> list[Path]:
    """Return the slides that the run file names."""
    return [path_or_url(slide) for slide in (ctx.default_map or {}).get(_SLIDES, [])]


def stated(ctx: typer.Context, *names: str) -> list[Any]:
    """Return the values of options that say one thing; where the command line has one, the file's are left out."""
    here = {name for name in names if _is_on_the_command_line(ctx, name)}
    return [ctx.params[name] if not here or name in here else None for name in names]


def is_said(ctx: typer.Context, name: str) -> bool:
    """Say whether the command line or the file has an option, and not its default alone."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "DEFAULT_MAP")


def effective(ctx: typer.Context) -> dict[str, Any]:
    """Return what each option is, by its long name, as JSON has it; those that say nothing are left out."""
    values = {long: (ctx.params.get(name), type_) for name, (long, type_) in _options(ctx.command).items()}
    return {long: _plain(_alone(value, type_)) for long, (value, type_) in values.items() if value is not None}


def _alone(value: Any, type_: Any) -> Any:
    """Return the number where an option that takes several has one."""
    numbers = get_args(_without_none(type_)) == (float,)
    return value[0] if numbers and len(value) == 1 else value


def _is_on_the_command_line(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _options(command: Any) -> dict[str, tuple[str, Any]]:
    """Return the long name and the type of each parameter of a command's function."""
    types = get_type_hints(command.callback)
    longest = {param.name: max(param.opts, key=len).lstrip("-") for param in command.params}
    return {name: (long, types[name]) for name, long in longest.items() if name in types}


def _value(path: Path, key: str, value: Any, hint: Any) -> Any:
    """Return a value of TOML as text of a command line; flags stay what they are."""
    inner = _without_none(hint)
    if get_origin(inner) is list:
        (each,) = get_args(inner)
        if each is float and not isinstance(value, list):  # one number may stand alone
            value = [value]
        if not isinstance(value, list):
            raise _wrong(path, key, value, f"a list, each {_wanted(each)[1]}")
        return [_value(path, key, one, each) for one in value]
    fits, what = _wanted(inner)
    if not fits(value) or value == "" or (isinstance(value, str) and "\0" in value):
        raise _wrong(path, key, value, what)
    if inner is Path and not (value.startswith(HUB) or is_url(value)):
        return str(path.parent / value)
    return value if inner is bool else str(value)


def _wanted(type_: Any) -> tuple[Callable[[Any], bool], str]:
    """Return what tells whether a value of TOML can be of a type, and what it must be, in words."""
    if get_origin(type_) is Literal or (isinstance(type_, type) and issubclass(type_, Enum)):
        choices = [str(one) for one in (get_args(type_) or type_)]
        return choices.__contains__, f"one of {', '.join(choices)}"
    if type_ is bool:
        return lambda value: isinstance(value, bool), "true or false"
    if type_ is int:
        return lambda value: type(value) is int, "a whole number"
    if type_ is float:
        return lambda value: type(value) in (int, float), "a number"
    if type_ is Path:
        return lambda value: isinstance(value, str), "a path in quotes"
    return lambda value: type(value) in (int, str), "text in quotes, or a whole number"  # "auto", or 8


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (one for one in get_args(hint) if one is not type(None))
    return hint


def _wrong(path: Path, key: str, value: Any, what: str) -> UsageError:
    shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:57]}..."
    return UsageError(f"{path}: {key} = {shown}: must be {what}", hint="mtdp-extract --help explains each option.")


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, bool | int | float) else str(value)
