"""ONNX files as protobuf: the messages of onnx.proto in which weights lie, and the metadata.

ONNX Runtime checks all the rest. The package `onnx`, which knows every message, takes 35 MB and a
tenth of a second of each start. Unknown fields are skipped; numbers of known ones never change.
"""

from __future__ import annotations

from typing import Any, Final

EXTERNAL: Final = 1
"""`data_location` of a tensor whose numbers are in another file."""

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
"""Number, name and type of each field; * = repeated."""


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
