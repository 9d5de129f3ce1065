"""The default model: a small convolutional network that reads scikit-learn's handwritten digits.

The weights beside this file were made by `python -m serve_app.gateway.digits`. That trains in seconds on three quarters
of the bundled set (1,797 images of 8 x 8, values 0-16), prints the accuracy on the held-out quarter and refuses to
write weights below 97 %.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from serve_app.gateway.tensors import TensorSpec
from serve_app.protocol_error import InvalidInput

WEIGHTS = Path(__file__).with_name("digits.safetensors")
TRAIN_COMMAND = "python -m serve_app.gateway.digits"
MIN_ACCURACY = 0.97
_SEED = 0
_EPOCHS = 30
_BATCH = 64
_PEAK_RATE = 1e-2


def network() -> nn.Sequential:
    """The network: pixels scaled to 0-1 `[N, 64]` to logits `[N, 10]`; 9,930 parameters."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def split() -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Training pixels `[1347, 64]` (0-16) and labels `[1347]`, then the same held out `[450, 64]`, `[450]`."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - a replica that only serves does not need sklearn
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    digits = load_digits()
    pixels, labels = digits.data.astype(np.float32), digits.target.astype(np.int64)
    train_x, test_x, train_y, test_y = train_test_split(pixels, labels, test_size=0.25, random_state=0, stratify=labels)
    return train_x, train_y, test_x, test_y


def train(
    pixels: NDArray[np.float32], labels: NDArray[np.int64], seed: int = _SEED, epochs: int = _EPOCHS
) -> nn.Module:
    """Trains a new network on `pixels` `[N, 64]` (0-16) and `labels` `[N]`; the same seed gives the same network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = network()
    inputs, targets = torch.tensor(pixels) / 16, torch.tensor(labels)
    steps = -(-len(inputs) // _BATCH) * epochs
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_RATE, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs), generator=generator).split(_BATCH):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs[batch]), targets[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return net


def accuracy(net: nn.Module, pixels: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Fraction of `pixels` `[N, 64]` (0-16) that the network reads as `labels` `[N]`."""
    with torch.inference_mode():
        predicted = net(torch.tensor(pixels) / 16).argmax(dim=1).numpy()
    return float((predicted == labels).mean())


class Digits:
    """Reads digits: `pixels` FP32 `[N, 64]` (clipped to 0-16) to `digit` INT64 `[N]`, `probabilities` `[N, 10]`."""

    name = "digits"
    platform = "pytorch"
    inputs = (TensorSpec("pixels", "FP32", (-1, 64), finite=True),)
    outputs = (TensorSpec("digit", "INT64", (-1,)), TensorSpec("probabilities", "FP32", (-1, 10)))
    max_rows = 65_536

    def __init__(self, weights: Path | str = WEIGHTS) -> None:
        torch.set_num_threads(1)  # replicas share a node's cores; this network is too small to split
        path = Path(weights)
        if not path.exists():
            raise FileNotFoundError(f"weights {path} are missing: `{TRAIN_COMMAND}` makes them in seconds")
        self._net = network()
        self._net.load_state_dict(load_file(path))
        self._net.eval()

    async def infer(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
        """Reads every row of `inputs["pixels"]`; a call takes well under a millisecond for a few rows."""
        pixels = inputs["pixels"]
        if len(pixels) > self.max_rows:
            raise InvalidInput(f"input 'pixels': {len(pixels)} rows; send at most {self.max_rows} in a request")
        with torch.inference_mode():
            scaled = torch.tensor(pixels).clamp_(0, 16).div_(16)
            probabilities = self._net(scaled).softmax(dim=1)
            return {"digit": probabilities.argmax(dim=1).numpy(), "probabilities": probabilities.numpy()}


def main() -> None:
    """Trains, reports the accuracy on the held-out quarter and writes the weights."""
    torch.set_num_threads(1)
    train_x, train_y, test_x, test_y = split()
    net = train(train_x, train_y)
    reached = accuracy(net, test_x, test_y)
    print(f"accuracy {reached:.4f} on {len(test_x)} images that training did not see")
    if reached < MIN_ACCURACY:
        raise SystemExit(f"accuracy {reached:.4f}: must be at least {MIN_ACCURACY}; no weights written")
    notes = {"accuracy": reached, "seed": _SEED, "epochs": _EPOCHS, "command": TRAIN_COMMAND}
    save_file(net.state_dict(), WEIGHTS, metadata={"shadecast": json.dumps(notes)})
    print(f"wrote {WEIGHTS} ({WEIGHTS.stat().st_size} bytes)")


def trained_accuracy(weights: Path = WEIGHTS) -> float:
    """The held-out accuracy recorded when the weights were written."""
    with safe_open(weights, framework="numpy") as file:
        return float(json.loads(file.metadata()["shadecast"])["accuracy"])


if __name__ == "__main__":
    main()
