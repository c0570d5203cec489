"""`kelp export`, and ONNX files as networks: the same probabilities, and nothing from elsewhere."""

import json
import logging
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from bundles import STATISTICS, tiny_bundle, tiny_spec, use_pixel_network
from inference.test_predict import predict
from laws import write_scenes
from onnx import TensorProto, helper, numpy_helper
from world import coast, read_tif, write_tif

import kelp
from kelp.cli import main
from kelp.config import ExportConfig, PredictConfig, VerifyConfig
from kelp.errors import BundleError, ConfigError, KelpError
from kelp.inference import backends
from kelp.inference.backends import Processor
from kelp.inference.backends.onnx import SPEC_KEY, WEIGHTS_KEY, OnnxFile, model_class, tensors
from kelp.inference.bundle import read_spec
from kelp.nn import export as module
from kelp.nn import resize
from kelp.nn.bundle import describe_bundle, load_network, save_bundle
from kelp.nn.export import add_network_file
from kelp.nn.model import KelpNet
from kelp.raster.bands import BANDS, NODATA
from kelp.raster.masks import read_mask
from kelp.raster.streaming import ChannelStats
from kelp.sensors.record import read_record, record_path

INDICES = ("NDVI", "mCRIG", "DEMWM")
WITH_INDICES = {
    "spectral_indices": INDICES,
    "statistics": STATISTICS
    | dict.fromkeys(INDICES, ChannelStats(-1, 1, 0, 0.3, -0.8, 0.9, 1000, 0)),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A bundle of the pixel network, and its ONNX file."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        use_pixel_network(patch)
        bundle = tiny_bundle(folder / "bundle")
        export(bundle, folder / "model.onnx")
    return bundle, folder / "model.onnx"


@pytest.fixture
def pixel_network(monkeypatch):
    use_pixel_network(monkeypatch)


def export(bundle, path):
    return kelp.export(ExportConfig(run_dir=bundle, output_path=path))


def crops(shape, count=3, seed=3):
    """Raw numbers with every kind of trouble, drawn otherwise than the export's own."""
    rng = np.random.default_rng(seed)
    raw = np.rint(rng.uniform(6500, 22000, (count, 7, *shape))).astype(np.float32)
    raw[:, 5] = rng.random((count, *shape)) < 0.2
    raw[:, 6] = rng.integers(-20, 60, (count, *shape))
    raw[0][rng.random(raw[0].shape) < 0.2] = np.nan
    raw[1 % count, 1] = NODATA
    raw[-1, :, : shape[0] // 2] = np.nan
    return torch.from_numpy(raw)


def difference(bundle, path, count=3):
    """Of probabilities, ONNX Runtime against torch."""
    raw = crops(kelp.load_bundle(bundle).spec.tile_size, count).numpy()
    wanted = kelp.load_bundle(bundle).on(Processor("cpu", "32-true", 1)).probabilities(raw)
    got = OnnxFile.read(path).net.probabilities(raw)
    assert got.dtype == np.float32
    assert got.shape == wanted.shape == (1, count, *raw.shape[2:])
    assert 0.05 < wanted.mean() < 0.95
    return np.abs(got - wanted).max()


@pytest.mark.parametrize(
    "changes",
    [
        {"interpolation": "nearest", "tile_size": (24, 40)},
        {"interpolation": "bilinear", **WITH_INDICES},
        {"interpolation": "bicubic", "tile_size": (96, 80)},  # shrinks, antialiased
        {"resize_strategy": "pad", "tile_size": (30, 45), "normalization_strategy": "z-score"},
        {"fill_missing_pixels_with_torch_nan": False, "normalization_strategy": "min-max"},
        {"normalization_strategy": "per-sample-min-max", "resize_strategy": "pad"},
        {"normalization_strategy": "per-sample-quantile"},
    ],
)
@pytest.mark.usefixtures("pixel_network")
def test_the_graph_answers_as_the_modules_do(tmp_path, changes):
    bundle = tiny_bundle(tmp_path / "bundle", **changes)
    result = export(bundle, tmp_path / "model.onnx")
    assert difference(bundle, result.path) < 1e-5
    assert difference(bundle, result.path, count=1) < 1e-5
    assert 0 <= result.parity < 1e-5
    assert result.size == result.path.stat().st_size
    assert str(result.path) in result.summary()
    files = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert files == ["kelp-export.yaml", "model.onnx"]


def test_a_real_network_small_and_folded(tmp_path):
    bundle = tiny_bundle(
        tmp_path / "bundle", encoder="tu-resnet10t", decoder_channels=(16, 16, 8, 8, 8)
    )
    result = export(bundle, tmp_path / "model.onnx")
    assert difference(bundle, result.path) < 1e-4
    assert result.size < 1.05 * (bundle / "weights.safetensors").stat().st_size
    model = onnx.load(result.path)
    assert "BatchNormalization" not in Counter(node.op_type for node in model.graph.node)
    # What the runtimes that QGIS plugins bring along can read.
    assert model.ir_version == 8
    assert {(o.domain, o.version) for o in model.opset_import} == {("", 18)}
    onnx.checker.check_model(model, full_check=True)
    # No paths of the machine that exported.
    assert b"/site-packages/" not in result.path.read_bytes()


@pytest.mark.usefixtures("pixel_network")
def test_tracing_leaves_the_tables_of_resizing_whole(tmp_path):
    bundle = tiny_bundle(tmp_path / "bundle", tile_size=(28, 36))
    spec = read_spec(bundle)
    net = load_network(bundle, spec)
    resize._origins.cache_clear()
    resize._back.cache_clear()
    module.trace(net, spec)
    assert net.probabilities(crops((28, 36))).isfinite().all()


def test_what_the_file_says_of_itself(exported):
    bundle, path = exported
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata[SPEC_KEY]) == json.loads((bundle / "bundle.json").read_text())
    assert metadata["kelp_version"] == kelp.__version__
    assert {key: json.loads(value) for key, value in metadata.items() if "kelp" not in key} == {
        "model_type": "Segmentor",
        "class_names": {"0": "background", "1": "kelp"},
        "resolution": 3000,
        "tile_size": 32,
        "tiles_overlap": 50,
        "standardization_mean": [0] * 7,
        "standardization_std": [1 / 255] * 7,
        "seg_thresh": 0.4,
        "seg_small_segment": 0,
    }
    net = OnnxFile.read(path).net
    (given,), (made,) = net._session.get_inputs(), net._session.get_outputs()
    assert (given.name, given.type, given.shape) == ("raw", "tensor(float)", ["batch", 7, 32, 32])
    assert (made.name, made.type, made.shape) == (
        "probability",
        "tensor(float)",
        ["batch", 1, 32, 32],
    )


def test_deepness_gives_the_network_raw_numbers():
    """Its arithmetic, restated: a 255th of every value, less the mean, by the deviation."""
    settings = module.deepness_settings(tiny_spec(image_size=32))
    mean, std = (np.array(settings[f"standardization_{k}"], np.float32)[0] for k in ("mean", "std"))
    for raw in (np.arange(65536, dtype=np.uint16), np.arange(-32768, 32768, dtype=np.int16)):
        fed = (np.float32(raw * 1.0 / 255.0) - mean) / std
        np.testing.assert_allclose(fed, raw, rtol=0, atol=0.01)
        exact = np.isin(raw, [NODATA, 0, 1])
        np.testing.assert_array_equal(fed[exact], raw[exact])


@pytest.fixture
def scenes(tmp_path):
    rng = np.random.default_rng(5)
    for i, shape in enumerate([(70, 50), (20, 90)]):
        write_tif(tmp_path / "scenes" / f"AA{i}_satellite.tif", coast(shape, rng)[0])
    return tmp_path / "scenes"


@pytest.mark.usefixtures("pixel_network")
def test_predict_through_the_file(exported, scenes, tmp_path):
    bundle, path = exported
    for run, out in ((bundle, "torch"), (path, "onnx"), (f"{path},{bundle}", "both")):
        assert predict(scenes, run, tmp_path / out, "--soft_labels") == 0
    for out in ("onnx", "both"):
        for name in ("AA0_kelp", "AA1_kelp"):
            wanted, got = (read_tif(tmp_path / o / f"{name}_prob.tif") for o in ("torch", out))
            np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
            assert np.nanmax(np.abs(got - wanted)) < 1e-3
            wanted, got = (read_mask(tmp_path / o / f"{name}.tif") for o in ("torch", out))
            assert (got == 1).sum() > 0
            assert (got != wanted).mean() < 1e-3


def test_backends_agree(tmp_path):
    """Law 15: within 1e-3 in probability, and at most 0.01 % of the masks' pixels differ."""
    torch.manual_seed(0)
    (scene,) = write_scenes(tmp_path / "s", [(150, 180)])
    spec = tiny_spec(encoder="tu-resnet10t", decoder_channels=(16, 16, 8, 8, 8))
    bundle = save_bundle(tmp_path / "bundle", KelpNet(spec), spec)
    options = {"device": "cpu", "precision": "32-true"}
    p = kelp.predict_array(kelp.load_bundle(bundle), read_tif(scene), **options)
    spec = read_spec(bundle).model_copy(update={"threshold": round(float(np.nanmedian(p)), 3)})
    describe_bundle(bundle, spec)
    add_network_file(bundle)
    assert (bundle / "network.onnx").is_file()
    maps = {}
    for backend in ("torch", "onnx"):
        out = tmp_path / backend
        more = ("--backend", backend, "--save_probabilities", "--tta")
        assert predict(scene, bundle, out, *more) == 0
        maps[backend] = (
            read_tif(out / "AA000000_kelp_prob.tif"),
            read_mask(out / "AA000000_kelp.tif"),
        )
    (p, mask), (other, other_mask) = maps.values()
    np.testing.assert_array_equal(np.isnan(p), np.isnan(other))
    assert np.nanmax(np.abs(p - other)) < 1e-3
    assert 0.2 < (mask == 1).mean() < 0.8
    assert (mask != other_mask).mean() <= 1e-4


@pytest.mark.usefixtures("pixel_network")
def test_auto_takes_the_faster_runtime_that_has_the_network(scenes, tmp_path, monkeypatch):
    bundle = tiny_bundle(tmp_path / "bundle")

    def runtime(*, bf16=False, driver=False, tile=None, **options):
        monkeypatch.setattr(backends, "cpu_has_bf16", lambda: bf16)
        monkeypatch.setattr(backends, "has_gpu_driver", lambda: driver)
        out = tmp_path / "out"
        config = PredictConfig(
            data_dir=scenes / "AA0_satellite.tif",
            run_dir=bundle,
            output_dir=out,
            overwrite=True,
            sahi_tile_size=tile,
            **options,
        )
        kelp.predict_scenes(config)
        return read_record(record_path(out / "AA0_kelp.tif")).backend

    assert runtime() == "torch"  # the bundle holds no ONNX file
    add_network_file(bundle)
    assert runtime() == "onnx"
    with monkeypatch.context() as patch:  # the runtime that made the map
        patch.delattr("kelp.nn.backend.load")
        kelp.verify(VerifyConfig(data_dir=scenes, predictions_dir=tmp_path / "out"))
    assert runtime(bf16=True) == "torch"
    assert runtime(driver=True) == "torch"
    assert runtime(bf16=True, driver=True, device="cpu", precision="32-true") == "onnx"
    assert runtime(precision="bf16-mixed") == "torch"
    assert runtime(backend="torch") == "torch"
    side = read_spec(bundle).tile_size[0]
    assert runtime(tile=side) == "onnx"
    assert runtime(tile=side + 32) == "torch"  # the graph takes tiles of one size
    spec = read_spec(bundle)
    describe_bundle(bundle, spec.model_copy(update={"temperature": 2.0}))
    assert runtime() == "torch"


def test_a_driver_is_asked_for_a_gpu_not_torch(monkeypatch):
    asked = []
    monkeypatch.setattr(backends.ctypes, "CDLL", asked.append)
    for system, library in (("linux", "libcuda.so.1"), ("win32", "nvcuda.dll")):
        monkeypatch.setattr(sys, "platform", system)
        assert backends.has_gpu_driver()
        assert asked[-1] == library


@pytest.mark.usefixtures("pixel_network")
def test_a_network_file_of_another_state_is_refused(tmp_path):
    bundle = tiny_bundle(tmp_path / "bundle")
    with pytest.raises(BundleError, match=r"holds no network\.onnx; make one with kelp export"):
        kelp.load_bundle(bundle, backend="onnx")
    result = kelp.export(ExportConfig(run_dir=bundle))
    assert result.path == bundle / "network.onnx"
    assert kelp.load_bundle(bundle, backend="onnx").net.runtime == "onnx"
    spec = read_spec(bundle)
    describe_bundle(bundle, spec.model_copy(update={"threshold": 0.9}))  # not in the graph
    assert kelp.load_bundle(bundle, backend="onnx").spec.threshold == 0.9
    describe_bundle(bundle, spec.model_copy(update={"temperature": 2.0}))
    with pytest.raises(BundleError, match=r"another state of the bundle .* kelp export"):
        kelp.load_bundle(bundle, backend="onnx")
    add_network_file(bundle)
    assert kelp.load_bundle(bundle, backend="onnx").spec.temperature == 2


@pytest.mark.usefixtures("pixel_network")
def test_outputs_of_the_bundle_do_not_pass_for_those_of_the_file(exported, scenes, tmp_path):
    """They may differ in the last digits, and finished outputs are kept."""
    for run in exported:
        assert predict(scenes, run, tmp_path / "out") == 0
    again = kelp.predict_scenes(
        kelp.config.PredictConfig(
            data_dir=scenes,
            run_dir=exported[1],
            output_dir=tmp_path / "out",
            device="cpu",
            precision="32-true",
        )
    )
    assert (again.made, again.skipped) == (0, 2)


def test_another_number_format_is_said_in_one_line(exported, caplog):
    scene = crops((50, 60))[2].numpy()
    bundle = kelp.load_bundle(exported[1])
    with caplog.at_level(logging.INFO, "kelp"):
        p = kelp.predict_array(bundle, scene, precision="32-true")
        assert not caplog.records
        kelp.predict_array(bundle, scene, precision="bf16-mixed")
    (record,) = caplog.records
    assert "model.onnx" in record.message
    assert "32-true" in record.message
    assert "bf16-mixed" in record.message
    assert 0 < np.isfinite(p).mean() < 1


def test_its_processor_is_the_cpu_in_float32(exported):
    net = kelp.load_bundle(exported[1]).net
    found = net.processor("auto", None, 3)
    assert (found.device, found.precision, found.threads) == ("cpu", "32-true", 3)
    raw = crops((32, 32)).numpy()
    one, three = (net.on(replace(found, threads=n)).probabilities(raw) for n in (1, 3))
    np.testing.assert_allclose(one, three, atol=1e-6)


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_a_graph_that_answers_otherwise_gets_no_name(exported, tmp_path, monkeypatch, value):
    """The planted fault: one weight changed between torch and the file."""

    def spoil(model, spec):
        for tensor in model.graph.initializer:
            weights = numpy_helper.to_array(tensor).copy()
            if weights.shape == (1, 7, 1, 1):  # the convolution's
                weights[0, BANDS.index("G")] += value
                tensor.CopyFrom(numpy_helper.from_array(weights, tensor.name))
        describe(model, spec)

    describe = module.describe
    monkeypatch.setattr(module, "describe", spoil)
    use_pixel_network(monkeypatch)
    (tmp_path / "model.onnx").write_text("an older file")
    with pytest.raises(KelpError, match=r"differ by (nan|[0-9.e-]+) in probability"):
        export(exported[0], tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "an older file"


def test_no_tensor_of_a_file_is_overlooked():
    """What kelp knows of ONNX is all of the package's messages in which tensors lie."""

    def within(message, known):
        """All messages that a message can hold."""
        known[message.name] = message
        for field in message.fields:
            if field.message_type and field.message_type.name not in known:
                within(field.message_type, known)
        return known

    def ways(model):
        """Fields that lead to a tensor: message, number, name, what it holds."""
        holders, found = {"TensorProto"}, None
        while found is None or holders != {*holders, *(way[0] for way in found)}:
            holders |= {way[0] for way in found or ()}
            found = {
                (name, field.number, field.name, field.message_type.name)
                for name, message in within(model, {}).items()
                for field in message.fields
                if field.message_type and field.message_type.name in holders
            }
        return found

    found = ways(model_class().DESCRIPTOR)
    assert ("GraphProto", 5, "initializer", "TensorProto") in found
    assert found == ways(onnx.ModelProto.DESCRIPTOR)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_extra_the_message_says_what_to_install(
    exported, tmp_path, monkeypatch, capfd, package
):
    monkeypatch.setitem(sys.modules, package, None)
    arguments = ["--run_dir", str(exported[0]), "--output_path", str(tmp_path / "model.onnx")]
    assert main(["export", *arguments, "--quiet"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert package in line
    assert 'pip install "kelp-slicer[train]"' in line
    if package == "onnxruntime":  # only the exporter needs the others
        with pytest.raises(KelpError, match=r"pip install \"kelp-slicer\[train\]\""):
            kelp.load_bundle(exported[1])


def test_only_onnx_files_and_only_of_bundles(exported, tmp_path):
    with pytest.raises(ConfigError, match=r"must end in \.onnx"):
        export(exported[0], tmp_path / "model.pt")
    with pytest.raises(BundleError, match="no such folder"):
        export(exported[1], tmp_path / "model.onnx")


def test_other_tiles_than_the_graphs_are_refused(exported):
    scene = crops((80, 70))[2].numpy()
    with pytest.raises(BundleError, match=r"model\.onnx: takes tiles of 32 x 32 px only, not 48"):
        kelp.predict_array(kelp.load_bundle(exported[1]), scene, tile=48)


def change_a_weight(model):
    big = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    big.raw_data = bytes([big.raw_data[0] ^ 1]) + big.raw_data[1:]


def put_weights_elsewhere(model):
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def put_a_constant_elsewhere(model):
    """In a subgraph, where it is easily overlooked."""
    tensor = TensorProto(name="far", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    branch = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "g", [], [])
    model.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=branch))


def forget_the_spec(model):
    kept = [entry for entry in model.metadata_props if entry.key != SPEC_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)


def set_spec(text):
    def change(model):
        (entry,) = (e for e in model.metadata_props if e.key == SPEC_KEY)
        entry.value = text(json.loads(entry.value))

    return change


def rename_the_input(model):
    for node in model.graph.node:
        node.input[:] = ["image" if name == "raw" else name for name in node.input]
    model.graph.input[0].name = "image"


def use_an_unknown_operation(model):
    model.graph.node[0].op_type = "NoSuchThing"


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (change_a_weight, "altered"),
        (put_weights_elsewhere, "other files"),
        (put_a_constant_elsewhere, "other files"),
        (forget_the_spec, SPEC_KEY),
        (set_spec(lambda spec: "{"), "not readable as JSON"),
        (set_spec(lambda spec: json.dumps(spec | {"schema_version": 9})), "schema version 9"),
        (set_spec(lambda spec: json.dumps(spec | {"threshold": 2})), "threshold"),
        (set_spec(lambda spec: json.dumps(spec | {"tile_size": [32, 48]})), "differ"),
        (rename_the_input, "inputs and outputs"),
        (use_an_unknown_operation, "ONNX Runtime refuses it"),
    ],
)
def test_foreign_and_altered_files_are_refused_in_one_line(exported, tmp_path, change, cause):
    model = onnx.load(exported[1])
    change(model)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=cause) as error:
        kelp.load_bundle(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(exported, tmp_path, share):
    content = exported[1].read_bytes()
    path = tmp_path / "model.onnx"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(BundleError, match=r"model\.onnx: "):
        kelp.load_bundle(path)


def test_no_file_text_and_folders(exported, tmp_path):
    with pytest.raises(BundleError, match="cannot be read"):
        kelp.load_bundle(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no protobuf at all")
    with pytest.raises(BundleError, match="no ONNX file"):
        kelp.load_bundle(tmp_path / "text.onnx")
    # A folder is a folder, whatever its name.
    shutil.copytree(exported[0], tmp_path / "folder.onnx")
    with pytest.MonkeyPatch.context() as patch:
        use_pixel_network(patch)
        assert kelp.load_bundle(tmp_path / "folder.onnx").spec.threshold == 0.4


def test_tensors_are_found_however_deep(exported):
    model = onnx.load(exported[1])
    shallow = len(model.graph.initializer)
    assert len(list(tensors(model))) >= shallow > 0
    put_a_constant_elsewhere(model)
    assert "far" in {tensor.name for tensor in tensors(model)}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert len(metadata[WEIGHTS_KEY]) == 64


FORKED = """
import gc, os, sys, time
from kelp.inference.bundle import load_bundle
from kelp.inference.backends import Processor

gc.disable()  # so that the child is who collects it
net = load_bundle(sys.argv[1]).on(Processor("cpu", "32-true", 2, ()))
cycle = [net]
cycle.append(cycle)
del net, cycle
time.sleep(0.5)  # until its threads sleep
child = os.fork()
if not child:
    gc.collect()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no forks")
def test_a_forked_process_does_not_wait_for_the_threads_of_a_session(exported):
    done = subprocess.run(
        [sys.executable, "-c", FORKED, exported[1]], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "7\n", done.stderr
