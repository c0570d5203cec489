"""What every command's configuration can do: validate, save, load, describe itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Self, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from kelp.errors import ConfigError
from kelp.io.files import write_text
from kelp.io.location import Url, is_url


def option(
    default: Any = ...,
    *,
    help: str,
    default_of: Callable[[dict[str, Any]], Any] | None = None,
    unit: str | None = None,
    aliases: tuple[str, ...] = (),
    resumable: bool = False,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """Declare one option: the CLI, the help, config files and the saved record come from it.

    `unit` is shown in brackets after the help; `aliases` are other spellings of the flag.
    `default_of` makes the default from the options declared before; the help names it.
    `resumable` options may differ when a training is resumed: finished epochs stay as they are.
    """
    given = {"default": default} if default_of is None else {"default_factory": default_of}
    return Field(
        **given,
        description=f"{help} [{unit}]" if unit else help,
        json_schema_extra={"aliases": list(aliases), "resumable": resumable},
        ge=ge,
        gt=gt,
        le=le,
        lt=lt,
    )


def split(value: Any) -> Any:
    """A list out of `a,b,c`, as flags give it."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, Path | int | float) else value


_UNITS: Final = {"": 1, "B": 1} | {
    f"{prefix}{kind}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for kind, base in (("", 1000), ("B", 1000), ("IB", 1024))
}


def parse_bytes(value: int | str) -> int:
    """`2GB`, `1.5GiB`, `800M` or a plain number of bytes as a number of bytes."""
    if not isinstance(value, str):
        return value
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())
    if parts is None or parts[2].upper() not in _UNITS:
        raise ValueError("a size is a number with a unit, as in 2GB, 800MB or 1.5GiB")
    size: float = float(parts[1]) * _UNITS[parts[2].upper()]
    return round(size)


Names = Annotated[tuple[str, ...], BeforeValidator(split)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(split)]
Integers = Annotated[tuple[int, ...], BeforeValidator(split)]
Floats = Annotated[tuple[float, ...], BeforeValidator(split)]
Bytes = Annotated[ByteSize, BeforeValidator(parse_bytes)]


def kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of: `tuple[Path, ...] | None` holds tuple and Path."""
    origin = get_origin(annotation)
    if origin is Literal:
        return {Literal}
    if origin is Annotated:
        return kinds(get_args(annotation)[0])
    return {origin or annotation}.union(*(kinds(part) for part in get_args(annotation)))


def choices(annotation: Any) -> list[str]:
    """The words that an annotation allows; empty where it allows any."""
    if get_origin(annotation) is Literal:
        return [str(word) for word in get_args(annotation)]
    return [word for part in get_args(annotation) for word in choices(part)]


class Config(BaseModel):
    """Base of all command configurations: frozen, strict about names, one-line errors.

    Raises:
        ConfigError: an option is missing, unknown, out of range, or contradicts another one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
    command: ClassVar[str] = ""
    """`slice` of `SliceConfig`."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        cls.command = cls.__name__.removesuffix("Config").lower()

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_line(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Python users, too, get a `KelpError` of one line instead of pydantic's report."""
        try:
            return handler(cls._named(values) if isinstance(values, dict) else values)
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None

    @classmethod
    def load(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read a YAML file of options; `overrides` win. Unknown options raise `ConfigError`."""
        told, given = cls._by_field(read_yaml(path)), cls._by_field(overrides or {})
        try:
            return cls.model_validate(told | given)
        except ConfigError as error:
            named = re.search(r"--(\w+)", error.message)
            if named and named[1] in told.keys() - given.keys():
                raise ConfigError(f"{path}: {error.message}") from None
            raise

    @classmethod
    def options(cls) -> dict[str, FieldInfo]:
        """Every option; the command's own first, then those that it shares with others."""
        declared = [name for base in cls.__mro__ for name in vars(base).get("__annotations__", ())]
        return {name: cls.model_fields[name] for name in declared if name in cls.model_fields}

    @classmethod
    def resumable(cls) -> set[str]:
        """Options that may differ when a training is resumed."""
        extras: dict[str, Any] = {k: f.json_schema_extra for k, f in cls.model_fields.items()}
        return {name for name, extra in extras.items() if extra and extra["resumable"]}

    @classmethod
    def _named(cls, values: dict[str, Any]) -> dict[str, Any]:
        named = cls._by_field(values)
        cls._refuse_urls(named)
        return named

    @classmethod
    def _by_field(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values by the names of their fields, whichever spelling they were given by."""
        fields: dict[str, str] = {}
        for name, info in cls.model_fields.items():
            extra: Any = info.json_schema_extra or {}
            fields |= dict.fromkeys(extra.get("aliases", ()), name)
        named: dict[str, Any] = {}
        for spelling, value in values.items():
            name = fields.get(spelling, spelling)
            if name in named:
                raise ConfigError(f"--{spelling}: another spelling of it is given too; keep one")
            named[name] = value
        return named

    @classmethod
    def _refuse_urls(cls, values: Mapping[str, Any]) -> None:
        """Raise `ConfigError` for a URL where a local path is wanted."""
        for name, value in values.items():
            field = cls.model_fields.get(name)
            allowed = kinds(field.annotation) if field else set()
            parts = split(value) if Path in allowed and Url not in allowed else ()
            for url in filter(is_url, parts if isinstance(parts, tuple) else ()):
                raise ConfigError(
                    f"--{name} {url}: takes local paths only (URLs are for --data_dir of most "
                    "commands and --output_dir of kelp predict); fetch it first"
                )

    def absolute(self) -> Self:
        """The same with absolute paths: what workers started in other folders can use."""

        def made(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(made(part) for part in value)
            return value.absolute() if isinstance(value, Path) else value

        fields = {name: made(getattr(self, name)) for name in type(self).model_fields}
        return self.model_copy(update=fields)

    def to_yaml(self) -> str:
        """The resolved configuration as YAML, readable by `load` and `--config`."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        return text

    @property
    def record_name(self) -> str:
        """Name of the file that a run's record has."""
        return f"kelp-{self.command}.yaml"

    def to_record(self) -> str:
        """The record of a run: `to_yaml` and a line that says what to do with it."""
        return f"# kelp {self.command} --config {self.record_name}\n" + self.to_yaml()

    def record(self, output_dir: Path) -> Path:
        """Write the resolved configuration to `<output_dir>/kelp-<command>.yaml`."""
        path = output_dir / self.record_name
        write_text(path, self.to_record())
        return path


def read_yaml(path: Path) -> dict[str, Any]:
    """Options of a YAML file, dashes turned into underscores."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config file ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not a YAML file ({reason})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config file holds `option: value` lines")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "missing":
        absent = "is missing" if len(first["loc"]) == 1 else f"has too few values {first['input']}"
        return f"--{name} {absent}; see --help"
    if first["type"] == "extra_forbidden":
        return f"there is no option --{name}; see --help"
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:] if reason else reason
    if not name:
        return reason
    return f"--{name}: {reason}, got {str(first['input'])!r}"
