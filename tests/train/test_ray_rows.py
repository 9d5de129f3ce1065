"""Rows of recorded and of made-up series meet in one batch of Ray Data, which takes them only if their types agree."""

import numpy as np

from models.grid import CHANNELS, N_TARGETS
from models.series import Series
from train.dataset import made_up_pieces
from train.ray_job import columns_of, rows_of


def test_recorded_and_made_up_rows_have_the_same_types():
    values = np.random.default_rng(1).random((400, len(CHANNELS)), dtype=np.float32)
    recorded = columns_of([Series("own", "a", "1", 1.0, values)], 256)
    made_up = rows_of(made_up_pieces(1, 256, 0)[0], "~", "made_up")[0]
    assert set(recorded) == set(made_up)
    arrays = [name for name in recorded if isinstance(recorded[name], np.ndarray)]
    assert len(arrays) > 2
    for name in arrays:
        found, wanted = recorded[name][0], np.asarray(made_up[name])
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
    assert recorded["moved"].shape[1] == N_TARGETS
