"""The default model: weights that ship, the training that made them, and the answers they give."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from serve_app.gateway import digits
from serve_app.protocol_error import InvalidInput

SHIPPED = "1029b6a56958e56ea6d3ed1978826ae21a0e2a7a4185e4ab9d227711ce8a17cb"
"""SHA-256 of the weights that `python -m serve_app.gateway.digits` wrote; change it with them."""


@pytest.fixture(scope="module")
def model() -> digits.Digits:
    return digits.Digits()


def read(model: digits.Digits, pixels: np.ndarray) -> dict[str, np.ndarray]:
    return asyncio.run(model.infer({"pixels": pixels}))


def test_the_shipped_weights_are_the_ones_that_were_tested() -> None:
    assert hashlib.sha256(digits.WEIGHTS.read_bytes()).hexdigest() == SHIPPED


def test_digits_that_training_never_saw_are_read_with_97_percent(model: digits.Digits) -> None:
    _, _, pixels, labels = digits.split()
    right = float((read(model, pixels)["digit"] == labels).mean())
    assert right >= digits.MIN_ACCURACY
    assert right == pytest.approx(digits.trained_accuracy(), abs=0.005)


def test_training_again_reaches_97_percent() -> None:
    train_x, train_y, test_x, test_y = digits.split()
    net = digits.train(train_x, train_y, epochs=12)
    assert digits.accuracy(net, test_x, test_y) >= digits.MIN_ACCURACY


def test_training_is_repeatable() -> None:
    train_x, train_y, _, _ = digits.split()
    first, second = (digits.train(train_x[:128], train_y[:128], epochs=2).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_and_held_out_images_are_apart() -> None:
    train_x, _, test_x, _ = digits.split()
    assert len(train_x) + len(test_x) == 1797
    assert not {row.tobytes() for row in train_x} & {row.tobytes() for row in test_x}


def test_outputs_have_the_declared_types_and_shapes(model: digits.Digits) -> None:
    for rows in (0, 1, 5):
        answer = read(model, np.zeros((rows, 64), np.float32))
        assert (answer["digit"].dtype, answer["digit"].shape) == (np.int64, (rows,))
        assert (answer["probabilities"].dtype, answer["probabilities"].shape) == (np.float32, (rows, 10))


def test_probabilities_sum_to_one_and_agree_with_the_digit(model: digits.Digits) -> None:
    answer = read(model, digits.split()[2])
    np.testing.assert_allclose(answer["probabilities"].sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_array_equal(answer["probabilities"].argmax(axis=1), answer["digit"])


def test_values_beyond_the_range_count_as_its_ends(model: digits.Digits) -> None:
    pixels = digits.split()[2][:20]
    wild = np.where(pixels == 0, -3e38, np.where(pixels == 16, 3e38, pixels)).astype(np.float32)
    np.testing.assert_array_equal(read(model, wild)["probabilities"], read(model, pixels)["probabilities"])


def test_read_only_input_is_read_and_not_written_to(model: digits.Digits) -> None:
    pixels = np.frombuffer(digits.split()[2][:2].tobytes(), np.float32).reshape(2, 64)
    before = pixels.copy()
    read(model, pixels)
    np.testing.assert_array_equal(pixels, before)


def test_too_many_rows_are_the_clients_error(model: digits.Digits) -> None:
    with pytest.raises(InvalidInput, match="65537 rows; send at most 65536"):
        read(model, np.zeros((65_537, 64), np.float32))


def test_missing_weights_say_which_command_makes_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`python -m serve_app\.gateway\.digits` makes them"):
        digits.Digits(tmp_path / "none.safetensors")


def test_a_replica_uses_one_thread(model: digits.Digits) -> None:
    assert torch.get_num_threads() == 1
