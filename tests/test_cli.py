"""The command line: spellings, precedence, help, exit codes."""

import gc
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

import kelp
from kelp.cli import COMMANDS, config_class, main
from kelp.config import PredictConfig, SliceConfig, TrainConfig
from kelp.errors import ConfigError, KelpError
from kelp.io import imported

ROOT = Path(kelp.__file__).parent.parent


class Result:
    def summary(self):
        return "done"


@pytest.fixture
def seen(monkeypatch):
    """Run commands up to their function: what it would have been called with."""
    calls = []

    def record(config, progress):
        calls.append(config)
        return Result()

    from kelp.data_prep import slicing
    from kelp.inference import predict

    monkeypatch.setattr(slicing, "slice_dataset", record)
    monkeypatch.setattr(predict, "predict_scenes", record)
    return calls


SLICE = ["slice", "--data_dir", "d", "--metadata_fp", "m", "--output_dir", "o"]
PREDICT = ["predict", "--data_dir", "d", "--run_dir", "r", "--output_dir", "o"]


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--image_size", "64"], "image_size", 64),
        (["--image-size", "64"], "image_size", 64),
        (["--image_size=64"], "image_size", 64),
        (["--image-size=64"], "image_size", 64),
        (["--image_size", "96", "--image-size=64"], "image_size", 64),
        (["--materialize"], "materialize", True),
        (["--no-materialize"], "materialize", False),
        (["--no_materialize"], "materialize", False),
        (["--materialize", "False"], "materialize", False),
        (["--materialize=false"], "materialize", False),
        (["--materialize=False", "--materialize"], "materialize", True),
        (["--materialize", "--no-materialize"], "materialize", False),
        (["--materialize", "False", "--stride=8"], "materialize", False),
        (["--band_order", "SWIR, NIR,R"], "band_order", ("SWIR", "NIR", "R")),
        (["--stride", "8"], "stride", 8),
        ([], "stride", None),
    ],
)
def test_spellings(seen, arguments, field, value):
    assert main([*SLICE, *arguments]) == 0
    assert getattr(seen[0], field) == value


def test_negative_numbers_and_aliases(seen):
    assert main([*PREDICT, "--soft_labels", "--run_dir", "a,b"]) == 0
    assert seen[0].save_probabilities is True
    assert seen[0].run_dir == (Path("a"), Path("b"))
    assert main([*PREDICT, "--soft-labels=False"]) == 0
    assert seen[1].save_probabilities is False
    assert main([*PREDICT, "--no-soft-labels"]) == 0
    assert seen[2].save_probabilities is False


def test_a_config_file_and_the_command_line_on_top(seen, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("data-dir: d\nmetadata_fp: m\noutput_dir: o\nimage_size: 64\nstride: 32\n")
    assert main(["slice", "--config", str(file), "--stride", "16"]) == 0
    assert (seen[0].image_size, seen[0].stride) == (64, 16)
    record = seen[0].record(tmp_path)
    assert record.name == "kelp-slice.yaml"
    assert SliceConfig.load(record) == seen[0]


def test_a_config_file_may_use_other_spellings(seen, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("soft-labels: true\n")
    assert main([*PREDICT, "--config", str(file)]) == 0
    assert seen[0].save_probabilities is True
    assert main([*PREDICT, "--config", str(file), "--save_probabilities", "False"]) == 0
    assert seen[1].save_probabilities is False
    options = {"data_dir": "d", "run_dir": "r", "output_dir": "o", "soft_labels": True}
    assert PredictConfig(**options).save_probabilities is True
    with pytest.raises(ConfigError, match="another spelling of it is given too"):
        PredictConfig(**options, save_probabilities=False)


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["slice", "--nonsense", "1"], "No such option"),
        (["slice", "--data_dir", "d"], "--metadata_fp is missing"),
        ([*SLICE, "--image_size", "big"], "--image_size"),
        ([*SLICE, "--image_size", "0"], "--image_size"),
        ([*SLICE, "--stride", "200"], "pixels between tiles would be lost"),
        ([*SLICE, "--materialize", "maybe"], "--materialize"),
        ([*SLICE, "--config", "absent.yaml"], "absent.yaml"),
        ([*SLICE, "stray"], "unexpected extra argument (stray); see kelp slice --help"),
        ([*SLICE, "--image_size"], "--image_size"),
        (["slcie"], "No such command 'slcie'; did you mean slice; see kelp --help"),
        (["search", "--stac", "u", "--bbox", "1,2,3"], "--bbox has too few values (1.0, 2.0, 3.0)"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(capfd, arguments, cause):
    assert main(arguments) == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert cause in error[0]


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "nonsense: 1\n"])
def test_broken_config_files(tmp_path, capfd, text):
    (tmp_path / "c.yaml").write_text(text)
    assert main([*SLICE, "--config", str(tmp_path / "c.yaml")]) == 2
    assert len(capfd.readouterr().err.strip().splitlines()) == 1


def test_the_file_of_a_wrong_option_is_named(tmp_path, capfd):
    file = tmp_path / "c.yaml"
    for text, cause in (
        ("stride: far\n", "--stride: "),
        ("strid: 9\n", "there is no option --strid"),
    ):
        file.write_text(text)
        assert main([*SLICE, "--config", str(file)]) == 2
        assert f"{file}: {cause}" in capfd.readouterr().err
    file.write_text("stride: 9\n")
    assert main([*SLICE, "--config", str(file), "--stride", "far"]) == 2
    assert str(file) not in capfd.readouterr().err


def test_a_bug_is_not_hidden(monkeypatch):
    from kelp.data_prep import slicing

    def broken(config, progress):
        raise RuntimeError("a bug")

    monkeypatch.setattr(slicing, "slice_dataset", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(SLICE)


def test_ctrl_c_is_130(monkeypatch, capfd):
    from kelp.data_prep import slicing

    def stopped(config, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(slicing, "slice_dataset", stopped)
    assert main(SLICE) == 130
    assert len(capfd.readouterr().err.strip().splitlines()) == 1


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert main(["--version"]) == 0
    assert kelp.__version__ in capsys.readouterr().out
    assert main([]) == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_meaning_and_numbers_a_unit(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    for field, info in config_class(name).model_fields.items():
        assert f"--{field}" in text
        assert info.description, field
        kind = str(info.annotation)
        numeric = "Literal" not in kind and ("int" in kind or "float" in kind)
        assert not numeric or info.description.endswith("]"), f"--{field} has no unit"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["predict", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    script = (
        "import sys; from kelp.cli import main; main(sys.argv[1:]); "
        "heavy = {'torch', 'numpy', 'pandas', 'rasterio', 'mlflow'} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_importing_kelp_is_light():
    script = "import sys, kelp; kelp.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_python_users_get_the_same_errors():
    with pytest.raises(ConfigError, match="output_dir"):
        PredictConfig(data_dir="d")
    with pytest.raises(ConfigError, match="there is no option nonsense"):
        SliceConfig(data_dir="d", metadata_fp="m", output_dir="o", nonsense=1)
    with pytest.raises(ConfigError, match="multiple of 32"):
        TrainConfig(data_dir="d", metadata_fp="m", output_dir="o", image_size=350)


@pytest.mark.parametrize(
    ("written", "parameters"),
    [
        ("--image_size 350 px: no", "image_size=350 px: no"),
        ("only tiles; add --sahi True", "only tiles; add sahi=True"),
        ("--lr 1e-05: too low", "lr=1e-05: too low"),
        ("--weights: 3 weights", "weights: 3 weights"),
        ("--gt_dir a-b--c", "gt_dir a-b--c"),
        ("srun with --ntasks-per-node", "srun with --ntasks-per-node"),
        ("go on with kelp train --resume_from", "go on with kelp train --resume_from"),
        ("a name--like this", "a name--like this"),
    ],
)
def test_python_users_read_parameters_and_the_command_line_flags(written, parameters):
    error = KelpError(written)
    assert (str(error), error.message) == (parameters, written)
    quoted = KelpError(f"f.tif: {error}")
    assert (str(quoted), quoted.message) == (f"f.tif: {parameters}", f"f.tif: {written}")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a"])
def test_an_experiment_is_a_plain_name(name):
    with pytest.raises(ConfigError, match=r"experiment .*: a plain name"):
        TrainConfig(data_dir="d", metadata_fp="m", output_dir="o", experiment=name)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_function(name):
    import importlib

    module, _, function = COMMANDS[name].target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_records_are_plain_yaml():
    config = SliceConfig(data_dir="d", metadata_fp="m", output_dir="o")
    assert yaml.safe_load(config.to_yaml())["data_dir"] == "d"


def test_a_full_standard_output_is_one_line():
    if not Path("/dev/full").exists():
        pytest.skip("the system has no device that is always full")
    command = [sys.executable, "-m", "kelp", "models"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("kelp: error: standard output cannot be written (No space")
    assert done.stderr.count("\n") == 1


def test_rio_has_the_program_as_a_plugin(seen):
    """`rio kelp`, as rasterio's group loads it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    group = "rasterio.rio_plugins"
    ((name, target),) = project["entry-points"][group].items()
    plugin = EntryPoint(name, target, group).load()
    rio = click.Group("rio", commands={name: plugin})
    done = CliRunner().invoke(rio, ["kelp", *PREDICT, "--tta", "--quiet"])
    assert (done.exit_code, done.stdout) == (0, "done\n")
    assert seen[0].tta
    assert "Usage: kelp predict" in CliRunner().invoke(rio, ["kelp", "predict", "--help"]).stdout
    wrong = CliRunner().invoke(rio, ["kelp", "predict", "--no_such=1"])
    assert wrong.exit_code == 2
    assert wrong.stderr.startswith("kelp: error: No such option")


def test_imports_are_frozen_in_a_process_of_its_own_only(monkeypatch):
    imported("kelp.inference.predict")
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, 0)
    assert main(["--version"]) == 0
    assert gc.get_freeze_count() == 0
    monkeypatch.setattr(sys, "argv", ["kelp", "--version"])
    try:
        assert main() == 0
        imported("kelp.inference.predict")
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
    gc.disable()
    try:
        imported("kelp.inference.predict")
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_nothing_is_frozen_at_the_end_of_the_process():
    """triton would print a page about what is left over."""
    code = (
        "import atexit, gc, sys; atexit.register(lambda: print(gc.get_freeze_count())); "
        "sys.argv = ['kelp', '--version']; from kelp.cli import main; main(); "
        "print(gc.get_freeze_count() > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split()[-2:] == ["True", "0"], done.stderr
