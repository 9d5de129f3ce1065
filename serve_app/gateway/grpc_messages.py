"""Messages of the published `protos/grpc_service.proto`, made from its compiled descriptors (`make protos`).

They live in a pool of their own: protobuf's default pool takes each name once in a process, and `inference.*` belongs
there to whoever imports `tritonclient.grpc` or another generated module of the same protocol.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from serve_app.protocol_error import ProtocolError

DESCRIPTORS = Path(__file__).parent / "protos" / "grpc_service.binpb"

Message = Any
"""A protobuf message: its classes are made at import, so there are no types for it."""

_pool = DescriptorPool()
for _file in FileDescriptorSet.FromString(DESCRIPTORS.read_bytes()).file:
    _pool.Add(_file)


def _class(name: str) -> Any:
    return GetMessageClass(_pool.FindMessageTypeByName(f"inference.{name}"))


ServerLiveResponse = _class("ServerLiveResponse")
ServerReadyResponse = _class("ServerReadyResponse")
ModelReadyRequest = _class("ModelReadyRequest")
ModelReadyResponse = _class("ModelReadyResponse")
ServerMetadataResponse = _class("ServerMetadataResponse")
ModelMetadataRequest = _class("ModelMetadataRequest")
ModelMetadataResponse = _class("ModelMetadataResponse")
ModelConfigRequest = _class("ModelConfigRequest")
ModelConfigResponse = _class("ModelConfigResponse")
ModelStatisticsRequest = _class("ModelStatisticsRequest")
ModelStatisticsResponse = _class("ModelStatisticsResponse")
RepositoryIndexRequest = _class("RepositoryIndexRequest")
RepositoryIndexResponse = _class("RepositoryIndexResponse")
ModelInferRequest = _class("ModelInferRequest")
ModelInferResponse = _class("ModelInferResponse")
ModelStreamInferResponse = _class("ModelStreamInferResponse")


def parse(message: Any, body: bytes) -> Message:
    """A message of the given class from its bytes; raises ProtocolError (400)."""
    try:
        return message.FromString(body)
    except DecodeError:
        raise ProtocolError(400, f"the message is not a valid inference.{message.DESCRIPTOR.name}") from None
