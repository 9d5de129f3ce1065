"""Versions of the forecaster in a folder or any pyarrow filesystem: weights, card, champion pointer, history.

    <root>/<version>/weights.safetensors   tensors only, nothing is unpickled
    <root>/<version>/card.json             what it is, what it was trained on, how it did
    <root>/<version>/backtest.png          optional
    <root>/champion.json                   {"version": ..., "history": [...], "challenger": ...}, replaced atomically

A version is complete when its card is there: the card is written last. Nothing is ever loaded that does not agree with
its card (checksum, schema, shapes); whoever asked keeps what it had.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import safetensors
import safetensors.torch
import torch

from models.baselines import LAGS, NAMES, Ridge
from models.features import N_ANCHORS, N_EXTENDED_FEATURES, N_FEATURES
from models.forecaster import Model
from models.grid import CHANNELS, EXTENDED, N_HORIZONS, N_TARGETS, TARGETS
from models.lstm import ForecastNet, LstmConfig
from shadecast.errors import ConfigError, ShadecastError
from shadecast.types import HORIZONS_S, QUANTILES

CARD_SCHEMA = 2
"""2: corrections in units of the best anchor's usual error, baselines' residuals in units of their own."""
MAKE_ONE = "make one with `python -m train`"
SHIPPED = Path(__file__).parent / "checkpoints"
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class RegistryError(ShadecastError):
    """A version or pointer is missing, corrupt or of another schema; nothing was changed or loaded."""


@dataclass(slots=True)
class Registry:
    """`uri` is a folder or a pyarrow filesystem URI (file://, s3://, gs://, hdfs://)."""

    uri: str = str(SHIPPED)
    _fs: Any = None
    _root: str = field(init=False)

    def __post_init__(self) -> None:
        try:
            if "://" in self.uri:
                self._fs, root = pafs.FileSystem.from_uri(self.uri)
            else:
                self._fs, root = pafs.LocalFileSystem(), str(Path(self.uri).expanduser().absolute())
        except (OSError, ValueError) as error:
            raise ConfigError(f"registry = {self.uri!r}: cannot be opened ({error}); give a folder or a URI") from None
        self._root = root.rstrip("/")

    def versions(self) -> list[str]:
        """Complete versions, oldest first by creation time in their cards."""
        folder = pafs.FileSelector(self._root, allow_not_found=True)
        names = [i.base_name for i in self._fs.get_file_info(folder) if i.type == pafs.FileType.Directory]
        cards = {n: self._json(f"{n}/card.json") for n in names if self._exists(f"{n}/card.json")}
        return sorted(cards, key=lambda n: (float(cards[n].get("created_wall_s", 0.0)), n))

    def champion(self) -> str:
        """Version that forecasters run; raises RegistryError where none is chosen."""
        pointer = self._pointer()
        if not pointer.get("version"):
            raise RegistryError(f"{self.uri}: no champion; {MAKE_ONE} or `shadecast forecaster promote VERSION`")
        return str(pointer["version"])

    def history(self) -> list[str]:
        """Champions before the present one, oldest first."""
        return [str(v) for v in self._pointer().get("history", [])]

    def challenger(self) -> str:
        """Version that forecasters score in shadow beside the champion; "" where none is chosen."""
        return str(self._pointer().get("challenger") or "")

    def card(self, version: str) -> dict[str, Any]:
        """The version's card; raises RegistryError where it is missing, not JSON, or of another schema."""
        if not _VERSION.fullmatch(version):
            raise RegistryError(f"version = {version!r}: must be letters, digits, - and _, at most 64")
        if not self._exists(f"{version}/card.json"):
            known = ", ".join(self.versions()) or "none"
            raise RegistryError(f"{self.uri}: no version {version!r} (there are: {known}); {MAKE_ONE}")
        card = self._json(f"{version}/card.json")
        expected = {
            "card_schema": CARD_SCHEMA,
            "targets": list(TARGETS),
            "channels": _channels(bool((card.get("lstm") or {}).get("features") == N_EXTENDED_FEATURES)),
            "horizons_s": list(HORIZONS_S),
            "quantiles": list(QUANTILES),
        }
        for name, value in expected.items():
            if card.get(name) != value:
                raise RegistryError(
                    f"{self.uri}/{version}: {name} = {card.get(name)!r}, this code needs {value!r}; {MAKE_ONE}"
                )
        return card

    def load(self, version: str) -> Model:
        """Weights and card as a ready model; raises RegistryError naming what is wrong with them."""
        card = self.card(version)
        blob = self._bytes(f"{version}/weights.safetensors")
        digest = hashlib.sha256(blob).hexdigest()
        where = f"{self.uri}/{version}/weights.safetensors"
        if digest != card.get("weights_sha256"):
            raise RegistryError(f"{where}: checksum differs from the card's, the file is corrupt; {MAKE_ONE}")
        try:
            tensors = safetensors.torch.load(blob)
            net = ForecastNet(_fitting(card["lstm"]))
            net.load_state_dict(_weights(net, tensors))
            model = _assemble(version, net, tensors, card)
        except (safetensors.SafetensorError, RuntimeError, KeyError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())  # torch explains itself over many lines
            raise RegistryError(f"{where}: does not fit this code ({reason}); {MAKE_ONE}") from None
        if not all(torch.isfinite(p).all() for p in net.parameters()):
            raise RegistryError(f"{where}: has weights that are not finite; {MAKE_ONE}")
        return model

    def save(self, model: Model, card: Mapping[str, Any], plot_png: bytes | None = None) -> None:
        """Add a version; raises RegistryError where it is there already."""
        if not _VERSION.fullmatch(model.version):
            raise RegistryError(f"version = {model.version!r}: must be letters, digits, - and _, at most 64")
        if self._exists(f"{model.version}/card.json"):
            raise RegistryError(f"{self.uri}: version {model.version!r} is there already; versions never change")
        blob = safetensors.torch.save(_tensors(model))
        full = {
            **card,
            "version": model.version,
            "card_schema": CARD_SCHEMA,
            "targets": list(TARGETS),
            "channels": _channels(model.net.config.extended),
            "horizons_s": list(HORIZONS_S),
            "quantiles": list(QUANTILES),
            "lstm": {
                name: getattr(model.net.config, name) for name in ("features", "anchors", "hidden", "layers", "mlp")
            },
            "weights_sha256": hashlib.sha256(blob).hexdigest(),
        }
        self._fs.create_dir(f"{self._root}/{model.version}", recursive=True)
        self._write(f"{model.version}/weights.safetensors", blob)
        if plot_png is not None:
            self._write(f"{model.version}/backtest.png", plot_png)
        self._write(f"{model.version}/card.json", (json.dumps(full, indent=1) + "\n").encode())

    def promote(self, version: str) -> None:
        """Make a version the champion, after checking that it loads; forecasters follow within 10 s."""
        self.load(version)
        pointer = self._pointer()
        old = pointer.get("version")
        if old == version:
            return
        history = [*pointer.get("history", []), *([old] if old else [])]
        waiting = "" if self.challenger() == version else self.challenger()
        self._point(version, history, waiting)

    def challenge(self, version: str) -> None:
        """Let forecasters score a version in shadow on live telemetry, after checking that it loads; "" ends that."""
        champion = self.champion()
        if version == champion:
            raise RegistryError(f"version = {version!r}: is the champion already, it needs no trial in shadow")
        if version:
            self.load(version)
        self._point(champion, self.history(), version)

    def rollback(self) -> str:
        """Return to the champion before the present one; raises RegistryError where there was none."""
        history = self.history()
        if not history:
            raise RegistryError(f"{self.uri}: there was no champion before {self.champion()!r} to go back to")
        self.load(history[-1])
        waiting = "" if self.challenger() == history[-1] else self.challenger()  # a champion needs no trial in shadow
        self._point(history[-1], history[:-1], waiting)
        return history[-1]

    def _point(self, version: str, history: list[str], challenger: str) -> None:
        pointer = {"version": version, "history": history} | ({"challenger": challenger} if challenger else {})
        self._write("champion.json", (json.dumps(pointer, indent=1) + "\n").encode())

    def _pointer(self) -> dict[str, Any]:
        return self._json("champion.json") if self._exists("champion.json") else {}

    def _exists(self, name: str) -> bool:
        return bool(self._fs.get_file_info(f"{self._root}/{name}").is_file)

    def _bytes(self, name: str) -> bytes:
        try:
            with self._fs.open_input_stream(f"{self._root}/{name}") as source:
                return bytes(source.read())
        except OSError as error:
            raise RegistryError(f"{self.uri}/{name}: cannot be read ({error}); {MAKE_ONE}") from None

    def _json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads(self._bytes(name))
        except ValueError as error:
            raise RegistryError(f"{self.uri}/{name}: is not JSON ({error}); {MAKE_ONE}") from None
        if not isinstance(value, dict):
            raise RegistryError(f"{self.uri}/{name}: must be a JSON object; {MAKE_ONE}")
        return value

    def _write(self, name: str, content: bytes) -> None:
        """Whole or not at all: a temporary file beside it, then a move."""
        folder, _, base = f"{self._root}/{name}".rpartition("/")
        self._fs.create_dir(folder, recursive=True)
        with self._fs.open_output_stream(f"{folder}/.{base}.tmp") as sink:
            sink.write(content)
        self._fs.move(f"{folder}/.{base}.tmp", f"{folder}/{base}")


def _weights(net: ForecastNet, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The net's part of a file.

    Nets of Shadecast 0.1 have one output more, after all others: the probability that the node will be slow. It was
    worse than the net's own quantiles at that, so it is left out; the other outputs do not depend on it.
    """
    found = {name.removeprefix("net."): tensor for name, tensor in tensors.items() if name.startswith("net.")}
    outputs = net.head.out_features
    return {
        name: tensor[:outputs] if name.startswith("head.") and len(tensor) == outputs + 1 else tensor
        for name, tensor in found.items()
    }


def _fitting(shape: Mapping[str, Any]) -> LstmConfig:
    """The card's shape; raises ConfigError where its inputs are not what this code's features make."""
    config = LstmConfig.from_mapping(dict(shape))
    for name, made in (("features", (N_FEATURES, N_EXTENDED_FEATURES)), ("anchors", (N_ANCHORS,))):
        if getattr(config, name) not in made:
            raise ConfigError(f"lstm.{name} = {getattr(config, name)}: this code makes {' or '.join(map(str, made))}")
    return config


def _channels(extended: bool) -> list[str]:
    return [*CHANNELS, *EXTENDED] if extended else list(CHANNELS)


def _tensors(model: Model) -> dict[str, torch.Tensor]:
    tensors = {f"net.{k}": v.detach().contiguous().clone() for k, v in model.net.state_dict().items()}
    tensors["ridge.weight"] = torch.from_numpy(np.stack([r.weight for r in model.ridge]).copy())
    tensors["ridge.intercept"] = torch.from_numpy(np.stack([r.intercept for r in model.ridge]).copy())
    tensors["baseline.residuals"] = torch.from_numpy(model.residuals.copy())
    return tensors


def _assemble(version: str, net: ForecastNet, tensors: Mapping[str, torch.Tensor], card: Mapping[str, Any]) -> Model:
    shapes = {
        "ridge.weight": (N_TARGETS, N_HORIZONS, LAGS),
        "ridge.intercept": (N_TARGETS, N_HORIZONS),
        "baseline.residuals": (N_TARGETS, len(NAMES), N_HORIZONS, len(QUANTILES)),
    }
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, must be {shape}")
    weight, intercept = tensors["ridge.weight"].numpy(), tensors["ridge.intercept"].numpy()
    unknown = [[None] * N_HORIZONS] * N_TARGETS
    prior = np.asarray(card.get("prior_skill") or unknown, np.float64).astype(np.float32)
    if prior.shape != (N_TARGETS, N_HORIZONS):
        raise ValueError(f"prior_skill has shape {prior.shape}, must be {(N_TARGETS, N_HORIZONS)}")
    return Model(
        version=version,
        net=net.eval(),
        ridge=tuple(Ridge(weight[t], intercept[t]) for t in range(N_TARGETS)),
        residuals=tensors["baseline.residuals"].numpy(),
        prior_skill=prior,
        alarm_precision=float(card.get("alarm_precision", 0.0)),
    )
