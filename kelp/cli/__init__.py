"""The `kelp` program: flags from configurations, progress on the screen, errors as exit codes.

Exit status: 0 done; 2 bad input or usage (one line on stderr); 130 Ctrl-C; anything else is a
bug and shows a traceback. Nothing heavy is imported before the arguments are parsed.
"""

from __future__ import annotations

import atexit
import errno
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from kelp.errors import BugError, KelpError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from kelp.config import Config


class Command(NamedTuple):
    """`module:function` that does it with its configuration, and what it is for.

    The configuration of `slice` is `kelp.config.SliceConfig`, see `config_class`.
    """

    target: str
    summary: str


COMMANDS: Final = {
    "metadata": Command(
        "kelp.data_prep.metadata:build_metadata",
        "Per-image facts, AOI groups, leak-free folds.",
    ),
    "stats": Command(
        "kelp.data_prep.stats:compute_stats",
        "Band and index statistics.",
    ),
    "indices": Command(
        "kelp.data_prep.catalogue:list_indices",
        "The spectral indices and their formulas.",
    ),
    "slice": Command(
        "kelp.data_prep.slicing:slice_dataset",
        "A dataset of small tiles.",
    ),
    "train": Command(
        "kelp.nn.training.folds:train_one_or_all",
        "One tracked run, ending in a bundle; or one for each fold.",
    ),
    "baseline": Command(
        "kelp.nn.training.baseline:train_baseline",
        "Boosted trees on single pixels: what a network has to beat.",
    ),
    "sweep": Command(
        "kelp.nn.search:sweep",
        "A search for better options of training: many runs, the best one's settings.",
    ),
    "tune": Command(
        "kelp.nn.comparison.tune:tune",
        "Threshold and calibration of a network, fitted on scenes it was not trained on.",
    ),
    "search": Command(
        "kelp.sensors.stac:search",
        "A list of scenes from a STAC service or catalogue.",
    ),
    "info": Command(
        "kelp.inference.info:info",
        "What kelp sees in scenes, before anything is run.",
    ),
    "predict": Command(
        "kelp.inference.predict:predict_scenes",
        "Masks and probabilities of scenes, in slices or whole.",
    ),
    "verify": Command(
        "kelp.inference.verify:verify",
        "Are maps what their records say? Some tiles of each are predicted again.",
    ),
    "models": Command(
        "kelp.inference.packaged:models",
        "The networks that come with kelp.",
    ),
    "export": Command(
        "kelp.nn.export:export",
        "A network as an ONNX file for other programs.",
    ),
    "submit": Command(
        "kelp.products.submission:submit",
        "The submission archive of a folder of masks.",
    ),
    "preview": Command("kelp.plotting.preview:preview", "Pictures of scenes and masks."),
    "split": Command(
        "kelp.data_prep.split:split_fold",
        "A fold's validation images and masks as a folder.",
    ),
    "evaluate": Command(
        "kelp.products.reports.run:evaluate_and_report",
        "Scores of masks against truth.",
    ),
    "report": Command(
        "kelp.products.reports.run:make_report",
        "One page about masks and their truth.",
    ),
    "compare": Command(
        "kelp.nn.comparison.compare:compare",
        "Should I slice? Variants of applying networks, side by side.",
    ),
    "ensemble": Command(
        "kelp.evaluation.ensembling:ensemble",
        "Weighted mean of prediction folders.",
    ),
    "beds": Command(
        "kelp.products.beds:beds",
        "Kelp beds as polygons, with their areas.",
    ),
    "areas": Command(
        "kelp.products.areas:areas",
        "Kelp area of each region in each scene, with intervals.",
    ),
    "series": Command(
        "kelp.products.series:series",
        "Quarterly and yearly series of a coast.",
    ),
    "stac": Command(
        "kelp.products.stac:stac",
        "A STAC item for each map, and a collection.",
    ),
    "view": Command(
        "kelp.products.view:view",
        "One HTML page: maps, beds, dates, areas.",
    ),
    "simulate": Command(
        "kelp.simulation.layout:simulate",
        "Simulated scenes, for trials.",
    ),
    "demo": Command(
        "kelp.demo.run:demo",
        "Everything above, small, ending in a report.",
    ),
}


def config_class(name: str) -> type[Config]:
    """The configuration class of a command: its options."""
    found: type[Config] = getattr(importlib.import_module("kelp.config"), f"{name.title()}Config")
    return found


class _Program(click.Group):
    """A group that builds a command only when it is called for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return build_command(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and (near := get_close_matches(args[0], COMMANDS, 1)):
            ctx.fail(f"No such command '{args[0]}'; did you mean {near[0]}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click's own would build every command only to show its first line.
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.summary) for name, command in COMMANDS.items()])


class _Command(click.Command):
    """A command that also takes `--no-flag`, which click keeps for flags without a value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        flags = {spelling for p in self.params if p.metavar == _BOOLEAN for spelling in p.opts}
        return super().parse_args(ctx, [_positive(arg, flags) for arg in args])


def _positive(argument: str, flags: set[str]) -> str:
    """`--no-flag` as `--flag=False`."""
    if argument.startswith(("--no-", "--no_")):
        flag = f"--{argument[5:].replace('-', '_')}"
        return f"{flag}=False" if flag in flags else argument
    return argument


def build_command(name: str) -> click.Command:
    """The click command of a configuration class: one flag for each field."""
    command = COMMANDS[name]
    config = config_class(name)
    params: list[click.Parameter] = []
    for field, info in config.options().items():
        extra: Any = info.json_schema_extra or {}
        spellings = [f"--{spelling}" for spelling in (field, *extra.get("aliases", ()))]
        meaning = f"{info.description}{_default(info)}"
        if info.annotation is bool:  # `--flag` alone means True
            option = click.Option(
                [*spellings, field],
                is_flag=False,
                flag_value="True",
                metavar=_BOOLEAN,
                help=meaning,
            )
        else:
            metavar = _metavar(info.annotation)
            option = click.Option([*spellings, field], metavar=metavar, help=meaning)
        params.append(option)
    params.append(click.Option(["--config", "config_file"], metavar="FILE", help=_CONFIG_HELP))
    params.append(click.Option(["--quiet"], is_flag=True, help="Only warnings and errors."))

    def run(config_file: str | None, quiet: bool, **values: str | None) -> None:
        _run(command, config, values, config_file, quiet)

    return _Command(
        name,
        params=params,
        callback=run,
        help=config.__doc__,
        context_settings=_SETTINGS,
    )


# `--data-dir` is `--data_dir`: dashes and underscores are one.
_SETTINGS: Final[dict[str, Any]] = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
    "token_normalize_func": lambda token: token.replace("-", "_"),
}

_TRAIN: Final = (
    "torch",
    "torchvision",
    "torchmetrics",
    "timm",
    "segmentation_models_pytorch",
    "lightning",
    "mlflow",
    "safetensors",
    "onnx",
    "onnxscript",
)
"""Packages of the extra `train`."""
_BOOLEAN: Final = "[True|False]"
_CONFIG_HELP: Final = "YAML file of options; flags on the command line win."


def _metavar(annotation: Any) -> str:
    """What the help shows for a value of an option."""
    from pydantic import ByteSize

    from kelp.config.base import choices, kinds
    from kelp.io.location import Url

    found = kinds(annotation)
    if words := choices(annotation):
        number = ["N"] if int in found else []  # a number, or one of the words
        return "|".join([*number, *words]) + (",…" if tuple in found else "")
    names = (
        (tuple, "A,B,…"),
        (ByteSize, "SIZE"),
        (Url, "PATH|URL"),
        (Path, "PATH"),
        (int, "N"),
        (float, "X"),
    )
    return next((name for kind, name in names if kind in found), "TEXT")


def _default(info: FieldInfo) -> str:
    """What the help says of an option's default; nothing where the help text itself does."""
    if info.is_required():
        return "  [required]"
    value = info.default
    if info.default_factory or value is None or value == ():
        return ""
    return f"  [default: {','.join(map(str, value)) if isinstance(value, tuple) else value}]"


def _run(
    command: Command,
    options: type[Config],
    values: dict[str, str | None],
    config_file: str | None,
    quiet: bool,
) -> None:
    from kelp.cli.console import reporting
    from kelp.io import imported

    given = {name: value for name, value in values.items() if value is not None}
    config = (
        options.load(Path(config_file), given) if config_file else options.model_validate(given)
    )
    module, _, function = command.target.partition(":")
    with reporting(quiet) as progress:
        try:
            result = getattr(imported(module), function)(config, progress=progress)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] not in _TRAIN:
                raise
            raise KelpError(
                f"this command needs {error.name}, which is not installed: "
                'pip install "kelp-slicer[train]"'
            ) from error
    _show(result)


def _show(result: Any) -> None:
    """The summary of a result, also of what was done beside failures."""
    if result is None or not (text := result.summary()):
        return
    try:
        click.echo(text)
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever read has enough; click ends quietly
            raise
        raise KelpError(
            f"standard output cannot be written ({error.strerror}); what the command made is kept"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run `kelp` with `argv` (default: the process's arguments); return the exit status."""
    if argv is None:  # the process is ours: what it imports stays to its end
        gc.freeze()
        atexit.register(_thaw)
    # Networks allocate the same large arrays for every batch; in huge pages that costs a fifth
    # less time. torch reads this once, when it is imported.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    program = _Program(
        "kelp",
        help="Find small things in big satellite images: slice, train, predict, merge, score.",
        context_settings=_SETTINGS,
        params=[_version_option()],
    )
    try:
        status = program.main(
            list(sys.argv[1:] if argv is None else argv), prog_name="kelp", standalone_mode=False
        )
    except click.exceptions.NoArgsIsHelpError as help_text:
        click.echo(help_text.format_message(), err=True)
        return 2
    except click.ClickException as error:
        where = getattr(error, "ctx", None)
        way_out = f"; see {where.command_path} --help" if where else ""
        return _fail(error.format_message().rstrip(".") + way_out)
    except KelpError as error:
        with suppress(KelpError):
            _show(error.result)
        return _fail(error.message)
    except BugError as error:
        with suppress(KelpError):
            _show(error.result)
        click.echo(f"kelp: {error}", err=True)
        return 1
    except (KeyboardInterrupt, click.Abort):
        click.echo("kelp: stopped; nothing half-written was left under a final name", err=True)
        return 130
    return status if isinstance(status, int) else 0


@click.command("kelp", context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def rio(arguments: tuple[str, ...]) -> None:
    """Find kelp in satellite images: the program kelp."""
    raise SystemExit(main(arguments))


def _thaw() -> None:
    """Let go of what was imported: the interpreter's end does so, and triton prints what stays."""
    gc.unfreeze()
    gc.disable()  # the end collects anyway


def _fail(message: str) -> int:
    click.echo(f"kelp: error: {' '.join(message.split())}", err=True)
    return 2


def _version_option() -> click.Option:
    def show(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            from kelp import __version__

            click.echo(f"kelp {__version__}")
            ctx.exit()

    return click.Option(
        ["--version"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=show,
        help="Show the version.",
    )
