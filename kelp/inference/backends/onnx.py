"""Networks as ONNX files: what such a file says of itself, and ONNX Runtime as a backend.

ONNX is protobuf: reading one runs nothing and unpickles nothing. ONNX Runtime is imported on first
use.
"""

from __future__ import annotations

import copy
import functools
import gc
import hashlib
import importlib
import logging
import os
from collections.abc import Iterator, MutableSequence, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from kelp import __version__
from kelp.config.choices import Precision
from kelp.errors import BundleError, KelpError
from kelp.inference.backends import DeviceName, Pixels, Processor, cpu_threads, viewed
from kelp.inference.spec import BundleSpec
from kelp.raster.bands import BANDS
from kelp.raster.window import Shape

log = logging.getLogger("kelp")

SUFFIX: Final = ".onnx"
INPUT: Final = "raw"
OUTPUT: Final = "probability"

SPEC_KEY: Final = "kelp_spec"
VERSION_KEY: Final = "kelp_version"
WEIGHTS_KEY: Final = "kelp_weights_sha256"

_AGAIN: Final = "copy the file again, or export it again with kelp export"
_EXTERNAL: Final = 1  # `data_location` of a tensor whose numbers are in another file
_ERRORS_ONLY: Final = 3  # severity: ONNX Runtime would tell stderr of every node it skips


def extra(module: str) -> Any:
    """A module of the extra `onnx`; without the extra a `KelpError` that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise KelpError(
            f'ONNX needs the package {module.partition(".")[0]}: pip install "kelp-slicer[train]"'
        ) from error


@functools.cache
def _keep_sessions_out_of_forks() -> None:
    """Let no forked child collect a session of its parent.

    To end one waits for its threads, which a child does not have: it would wait without end.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=gc.freeze)


class OnnxNet:
    """A network that ONNX Runtime computes, on the CPU, in float32."""

    runtime = "onnx"

    def __init__(self, content: bytes, name: str) -> None:
        """Start ONNX Runtime on a file's bytes; `name` is what messages call it.

        Raises:
            BundleError: ONNX Runtime refuses the graph, or it is no network of kelp's.
        """
        self._content = content
        self._name = name
        self._start(cpu_threads(None))
        self.version: str = extra("onnxruntime").__version__
        self.tile = self._tile()

    def _start(self, threads: int) -> None:
        _keep_sessions_out_of_forks()
        runtime = extra("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = self._threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        try:
            self._session = runtime.InferenceSession(
                self._content, options, providers=["CPUExecutionProvider"]
            )
        except _refusals() as error:
            reason = " ".join(str(error).split())
            raise BundleError(
                f"{self._name}: ONNX Runtime refuses it ({reason}); {_AGAIN}"
            ) from error

    def processor(
        self, device: DeviceName, precision: Precision | None, threads: int | None
    ) -> Processor:
        """The CPU in float32; where something else was asked for, one line says so."""
        if precision not in (None, "32-true") or device == "cuda":
            asked = f"{precision or ''} on the GPU".lstrip() if device == "cuda" else precision
            log.info("%s: ONNX Runtime computes in 32-true on the CPU, not %s", self._name, asked)
        versions = (__version__, f"ONNX Runtime {self.version}")
        return Processor("cpu", "32-true", cpu_threads(threads), versions)

    def on(self, processor: Processor) -> Self:
        """The same network with that number of threads."""
        if processor.threads == self._threads:
            return self
        net = copy.copy(self)
        net._start(processor.threads)
        return net

    def described(self, spec: BundleSpec) -> Self:
        """This network, if it is the one that is described: a graph takes tiles of one size.

        Raises:
            BundleError: it is another.
        """
        if spec.tile_size != self.tile:
            raise BundleError(self._other_tile(Shape(*spec.tile_size)))
        return self

    def allocate(self, shape: tuple[int, ...]) -> Pixels:
        """Zeros."""
        return np.zeros(shape, dtype=np.float32)

    def probabilities(self, raw: Pixels, symmetries: Sequence[int] = (0,)) -> Pixels:
        """Raw DN `(n, 7, h, w)` to probabilities `(len(symmetries), n, h, w)`, both float32.

        Raises:
            BundleError: the tiles have another size than the graph takes.
        """
        shape = Shape.of(raw)
        if shape != self.tile:
            raise BundleError(self._other_tile(shape))
        return viewed(self.run, raw, symmetries)

    def run(self, raw: Pixels) -> Pixels:
        """Raw DN `(n, 7, h, w)` to probabilities `(n, h, w)`, both float32."""
        feed = {INPUT: np.ascontiguousarray(raw)}
        probability: Pixels = self._session.run([OUTPUT], feed)[0]
        return probability[:, 0]

    def _other_tile(self, shape: Shape) -> str:
        return (
            f"{self._name}: takes tiles of {self.tile[0]} x {self.tile[1]} px only, not "
            f"{shape[0]} x {shape[1]}; leave --sahi_tile_size out, or use --backend torch "
            'with the run\'s bundle (pip install "kelp-slicer[train]")'
        )

    def _tile(self) -> Shape:
        """Height and width of the crops that the graph takes."""
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if [i.name for i in inputs] == [INPUT] and [o.name for o in outputs] == [OUTPUT]:
            match inputs[0].shape, outputs[0].shape:
                case (
                    [str(), channels, int(height), int(width)],
                    [str(), 1, int(rows), int(columns)],
                ) if channels == len(BANDS) and (height, width) == (rows, columns):
                    return Shape(height, width)
        raise BundleError(f"{self._name}: its inputs and outputs are not kelp's; {_AGAIN}")


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file of `kelp export`: its metadata, and the network ready to run."""

    metadata: dict[str, str]
    net: OnnxNet

    @classmethod
    def read(cls, path: Path) -> OnnxFile:
        """Read, check and start the network of a file.

        Raises:
            BundleError: no such file, no ONNX, not of kelp, altered, or with weights elsewhere.
            KelpError: the packages of the extra `onnx` are missing.
        """
        protobuf = extra("google.protobuf.message")
        try:
            content = path.read_bytes()
            model = model_class().FromString(content)
        except OSError as error:
            raise BundleError(
                f"{path}: cannot be read ({error.strerror}); check the path"
            ) from error
        except protobuf.DecodeError as error:
            raise BundleError(f"{path}: no ONNX file, or a truncated one; {_AGAIN}") from error
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        if SPEC_KEY not in metadata:
            raise BundleError(
                f"{path}: holds no description by kelp ({SPEC_KEY}), so its bands and numbers are "
                "unknown; make the file with kelp export"
            )
        # The file is all there is: a path in it could name any other file of this machine.
        if any(tensor.data_location == _EXTERNAL for tensor in tensors(model)):
            raise BundleError(f"{path}: keeps weights in other files, which kelp does not read")
        if weights_sha256(model) != metadata.get(WEIGHTS_KEY):
            raise BundleError(f"{path}: its weights were altered after the export; {_AGAIN}")
        return cls(metadata, OnnxNet(content, str(path)))


def tensors(message: Any) -> Iterator[Any]:
    """Every tensor within an ONNX message, however deep: weights, constants, subgraphs."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in value if isinstance(value, MutableSequence) else (value,):
            if field.message_type.name == "TensorProto":
                yield part
            else:
                yield from tensors(part)


def weights_sha256(model: Any) -> str:
    """SHA-256 of the weights of an ONNX model, with their names and shapes."""
    digest = hashlib.sha256()
    for tensor in model.graph.initializer:
        digest.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)}\n".encode())
        digest.update(tensor.raw_data)
    return digest.hexdigest()


def _refusals() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: it has no error type of its own that all share."""
    state = extra("onnxruntime.capi.onnxruntime_pybind11_state")
    found = (kind for kind in vars(state).values() if isinstance(kind, type))
    return (*(kind for kind in found if issubclass(kind, Exception)), RuntimeError, ValueError)


_MESSAGES: Final = {
    "ModelProto": "7 graph GraphProto, 14 metadata_props* StringStringEntryProto, "
    "20 training_info* TrainingInfoProto, 25 functions* FunctionProto",
    "StringStringEntryProto": "1 key string, 2 value string",
    "TrainingInfoProto": "1 initialization GraphProto, 2 algorithm GraphProto",
    "FunctionProto": "7 node* NodeProto, 11 attribute_proto* AttributeProto",
    "GraphProto": "1 node* NodeProto, 5 initializer* TensorProto, "
    "15 sparse_initializer* SparseTensorProto",
    "NodeProto": "5 attribute* AttributeProto",
    "AttributeProto": "5 t TensorProto, 6 g GraphProto, 10 tensors* TensorProto, "
    "11 graphs* GraphProto, 22 sparse_tensor SparseTensorProto, "
    "23 sparse_tensors* SparseTensorProto",
    "SparseTensorProto": "1 values TensorProto, 2 indices TensorProto",
    "TensorProto": "1 dims* int64, 2 data_type int32, 8 name string, 9 raw_data bytes, "
    "14 data_location int32",
}
"""Messages of onnx.proto in which weights lie, and the metadata: number, name and type of each
field, * = repeated. ONNX Runtime checks all the rest.

The package `onnx`, which knows every message, takes 35 MB and a tenth of a second of each start.
Unknown fields are skipped; numbers of known ones never change."""


def model_class() -> Any:
    """The class of `ModelProto`. Raises `ImportError` without the package protobuf."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="kelp/onnx.proto", package="kelp.onnx")
    for message, text in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for line in text.split(", "):
            number, name, kind = line.split()
            field = described.field.add(name=name.rstrip("*"), number=int(number))
            field.label = kinds.LABEL_REPEATED if name.endswith("*") else kinds.LABEL_OPTIONAL
            if kind in _MESSAGES:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".kelp.onnx.{kind}"
            else:
                field.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("kelp.onnx.ModelProto"))
