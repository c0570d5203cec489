"""`--backend openvino`: torch's probabilities, whatever the batch, and no word to anyone."""

import copy
import subprocess
import sys

import numpy as np
import openvino
import pytest
import torch
from bundles import tiny_bundle, use_pixel_network
from test_onnx import crops
from test_predict import predict
from torch import nn
from world import coast, read_tif, write_tif

import kelp
from kelp.cli import main
from kelp.config import ExportConfig
from kelp.errors import ConfigError, KelpError
from kelp.nn.inference.network import Network
from kelp.nn.openvino_body import OpenVinoBody

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    """A real network: a U-Net with a small ResNet, random weights."""
    folder = tmp_path_factory.mktemp("unet")
    return kelp.load_bundle(tiny_bundle(folder / "bundle", encoder="tu-resnet10t"))


@pytest.fixture
def pixel_bundle(tmp_path, monkeypatch):
    use_pixel_network(monkeypatch)
    return tiny_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-5), ("bf16-mixed", 0.02)])
def test_probabilities_are_those_of_torch(unet, precision, tolerance):
    raw = crops((32, 32), count=5).numpy()
    wanted = Network([unet], CPU, "32-true")(raw)
    got = Network([unet], CPU, precision, backend="openvino")(raw)
    assert got.dtype == np.float32
    assert wanted.std() > 0.01
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance)


def test_a_crop_does_not_depend_on_its_batch_or_on_threads(unet):
    raw = crops((32, 32), count=5).numpy()
    wanted = Network([unet], CPU, "32-true", backend="openvino")(raw)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = kelp.load_bundle(unet.path)  # a network keeps the threads it was made with
        single = Network([alone], CPU, "32-true", backend="openvino")
        for k in range(len(raw)):
            np.testing.assert_array_equal(single(raw[k : k + 1])[0], wanted[k])
    finally:
        torch.set_num_threads(before)


def test_tiles_of_another_size_and_symmetries(tmp_path):
    folder = tiny_bundle(tmp_path / "bundle", encoder="tu-resnet10t", resize_strategy="pad")
    bundle = kelp.load_bundle(folder)
    for shape in ((32, 32), (40, 70)):
        raw = crops(shape, count=2).numpy()
        wanted = Network([bundle], CPU, "32-true", "mean")(raw)
        got = Network([bundle], CPU, "32-true", "mean", "openvino")(raw)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


def test_the_command_and_python_agree(pixel_bundle, tmp_path, capfd):
    image, _ = coast((60, 90), np.random.default_rng(4))
    scene = write_tif(tmp_path / "scenes" / "X.tif", image)
    out = tmp_path / "out"
    for backend in ("torch", "openvino"):  # the second time it is another setting
        arguments = ["--save_probabilities", "--backend", backend]
        assert predict(scene.parent, pixel_bundle, out, *arguments) == 0
        assert "1 scenes predicted" in capfd.readouterr().out
    bundle = kelp.load_bundle(pixel_bundle)
    p = kelp.predict_array(bundle, image, precision="32-true", backend="openvino")
    np.testing.assert_array_equal(read_tif(out / "X_kelp_prob.tif")[0], p)
    torchs = kelp.predict_array(bundle, image, precision="32-true")
    np.testing.assert_allclose(p, torchs, rtol=0, atol=1e-5, equal_nan=True)


def test_a_network_is_made_ready_once(unet):
    first = unet.on(CPU, "32-true", "openvino")
    assert unet.on(CPU, "32-true", "openvino") is first
    assert unet.on(CPU, "32-true") is unet.net


def test_a_network_translated_wrongly_is_refused(unet, monkeypatch):
    """The planted fault: OpenVINO is handed a network with one weight changed."""
    convert = openvino.convert_model

    def spoiled(body, **options):
        body = copy.deepcopy(body)
        last = [module for module in body.modules() if isinstance(module, nn.Conv2d)][-1]
        with torch.no_grad():
            last.bias += 0.1
        return convert(body, **options)

    monkeypatch.setattr(openvino, "convert_model", spoiled)
    body = OpenVinoBody(unet.net.body, CPU, "32-true")
    for _ in range(2):  # and again, not only the first time
        with pytest.raises(KelpError, match=r"differs by 0\.0\d+ in f32\); use --backend torch"):
            body(torch.zeros(1, 7, 64, 64))


def test_what_openvino_cannot_translate_is_said_in_one_line(unet, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no conversion rule\nfor aten::strange")

    monkeypatch.setattr(openvino, "convert_model", refuse)
    with pytest.raises(KelpError, match=r"no conversion rule for aten::strange\); use --backend"):
        OpenVinoBody(unet.net.body, CPU, "32-true")(torch.zeros(1, 7, 64, 64))


def test_only_bundles_and_only_on_the_cpu(unet, pixel_bundle, tmp_path, capfd):
    with pytest.raises(ConfigError, match="--device cpu"):
        unet.on(torch.device("cuda"), "32-true", "openvino")
    model = tmp_path / "model.onnx"
    kelp.export(ExportConfig(run_dir=pixel_bundle, output_path=model))
    (tmp_path / "scenes").mkdir()
    write_tif(tmp_path / "scenes" / "X.tif", coast((40, 40), np.random.default_rng(4))[0])
    arguments = ["predict", f"--data_dir={tmp_path / 'scenes'}", f"--output_dir={tmp_path / 'out'}"]
    assert main([*arguments, f"--run_dir={model}", "--backend=openvino", "--quiet"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert str(model) in line
    assert "leave --backend out" in line


def test_without_the_extra_the_message_says_what_to_install(unet, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(KelpError, match=r'pip install "kelp-slicer\[openvino\]"'):
        unet.net.on(CPU, "bf16-mixed", "openvino")


def test_nobody_is_told_of_its_use():
    """OpenVINO's package sends events when it is imported, unless its telemetry is missing."""
    script = (
        "import sys; from kelp.nn.openvino_body import runtime; print(runtime('openvino')); "
        "print([name for name, module in sys.modules.items() if 'telemetry' in name and module "
        "and not name.startswith('openvino.tools')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    version, told = done.stdout.splitlines()
    assert version == f"openvino {openvino.__version__}"
    assert told == "[]"
