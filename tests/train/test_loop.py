"""Training is seeded, resumes where it was stopped, and learns what is there to learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.features import N_EXTENDED_FEATURES
from models.grid import EXTENDED
from models.lstm import ForecastNet, LstmConfig
from models.series import Series
from shadecast.errors import ConfigError
from tests.models.conftest import wave
from train.dataset import Split, made_up_pieces, parts, pieces, split_machines, split_recordings
from train.loop import (
    WARM_UP,
    Pieces,
    Progress,
    TrainConfig,
    batches,
    device_of,
    drawn,
    fit,
    join,
    loss_of,
    pieces_of,
    source_weight,
    tensors_of,
)
from train.timing import show, time_rows

SHAPE = LstmConfig(hidden=8, mlp=8)
CONFIG = TrainConfig(epochs=3, piece=60, batch=4)


def series(machine: str, recording: str = "r", length: int = 150, seed: int = 0, source: str = "s") -> Series:
    return Series(source, machine, recording, 1.0, wave(length, seed)[0])


@pytest.fixture(scope="module")
def data() -> Pieces:
    return pieces([series("a"), series("b", seed=1)], 0, CONFIG.piece, 1)


def trained(data: Pieces, config: TrainConfig, done: Progress | None = None) -> tuple[ForecastNet, list[Progress]]:
    torch.manual_seed(config.seed)
    net, seen = ForecastNet(SHAPE), list[Progress]()
    fit(net, data, config, done, seen.append)
    return net, seen


def same(a: ForecastNet, b: ForecastNet) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(data: Pieces) -> None:
    first, _ = trained(data, CONFIG)
    again, _ = trained(data, CONFIG)
    other, _ = trained(data, TrainConfig(epochs=3, piece=60, batch=4, seed=2))
    assert same(first, again)
    assert not same(first, other)


def test_a_run_stopped_after_any_epoch_ends_with_the_weights_of_one_never_stopped(data: Pieces, tmp_path: Path) -> None:
    whole, _ = trained(data, CONFIG)

    class Killed(Exception):
        pass

    for stop_after in (1, 2):
        path = tmp_path / "progress.pt"

        def save_and_die(progress: Progress, path: Path = path, stop_after: int = stop_after) -> None:
            progress.save(path)
            if progress.epoch == stop_after:
                raise Killed

        torch.manual_seed(CONFIG.seed)
        with pytest.raises(Killed):
            fit(ForecastNet(SHAPE), data, CONFIG, None, save_and_die)
        torch.manual_seed(999)
        resumed, seen = trained(data, CONFIG, Progress.load(path))
        assert [p.epoch for p in seen] == list(range(stop_after + 1, 4))
        assert same(whole, resumed)


def test_a_checkpoint_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "progress.pt"
    path.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"progress\.pt: no training checkpoint"):
        Progress.load(path)


def test_loss_falls(data: Pieces) -> None:
    _, seen = trained(data, TrainConfig(epochs=12, piece=60, batch=4, learning_rate=1e-2))
    assert seen[-1].loss < 0.9 * seen[0].loss


def test_padding_and_missing_samples_weigh_nothing(data: Pieces) -> None:
    net = ForecastNet(SHAPE)
    batch = {name: torch.as_tensor(getattr(data, name)[:4]) for name in Pieces.__dataclass_fields__}
    before = loss_of(net, batch, CONFIG)
    garbage = torch.where(batch["known"], batch["truth"], 1e9)
    after = loss_of(net, {**batch, "truth": garbage}, CONFIG)
    assert float(before.detach()) == pytest.approx(float(after.detach()))
    torch.autograd.backward(before)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())


def test_pieces_cover_a_series_once_and_know_nothing_before_the_warm_up_or_after_the_end() -> None:
    one = series("a", length=150)
    cut = pieces_of([one], np.ones(3, np.float32), 60)
    assert len(cut) == 3
    known = cut.known[..., 0, 0].reshape(-1)[:150]
    assert not known[:WARM_UP].any()
    assert known[WARM_UP:149].all()
    assert not known[149:].any()
    level = cut.anchors[..., 0, 0, 0].reshape(-1)[:150]
    assert level == pytest.approx(one.values[:, 0])


def test_machines_held_out_are_never_trained_on() -> None:
    everything = [series(f"m{i}", r) for i in range(8) for r in "ab"]
    split = split_machines(everything, 0.25, seed=1)
    trained_on, held = {s.machine for s in split.train}, {s.machine for s in split.held}
    assert len(held) == 2
    assert not trained_on & held
    assert len(split.train) + len(split.held) == len(everything)
    assert split_machines(everything, 0.25, seed=1) == split


def test_every_source_has_something_held_out_a_lone_machine_by_time() -> None:
    everything = [series("x", r, source="alone") for r in "abcd"] + [series(m, source="pair") for m in "pq"]
    split: Split = split_machines(everything, 0.25, seed=1)
    assert [s.recording for s in split.held if s.source == "alone"] == ["d"]
    assert len([s for s in split.held if s.source == "pair"]) == 1


def clocked(machine: str, began_s: float, length: int = 150) -> Series:
    return Series("log", machine, f"{machine}-{began_s:g}", 1.0, wave(length, seed=3)[0], began_s)


def test_a_log_is_split_by_time_whole_sessions_where_there_are_several() -> None:
    first, second = [clocked(m, 1000.0 + i) for i, m in enumerate("abc")], [clocked(m, 5000.0) for m in "ab"]
    split = split_machines(first + second, 0.25, seed=1)
    assert {s.recording for s in split.held} == {s.recording for s in second}
    assert {s.recording for s in split.train} == {s.recording for s in first}
    assert split.until_wall_s == {"log": 5000.0}


def test_a_single_session_is_split_by_machine_and_by_time() -> None:
    split = split_machines([clocked(m, 1000.0) for m in "abcd"], 0.25, seed=1)
    assert {s.machine for s in split.train} & {s.machine for s in split.held} == set()
    assert len({s.machine for s in split.held}) == 1
    cut_s = split.until_wall_s["log"]
    assert max(s.ended_wall_s for s in split.train) <= cut_s <= min(s.began_wall_s for s in split.held)
    assert sum(len(s.values) for s in split.held) == pytest.approx(0.25 * 150, abs=1)
    lone = split_machines([clocked("a", 1000.0)], 0.25, seed=1)
    assert (len(lone.train), len(lone.held)) == (1, 1)


def test_what_lies_between_two_times_keeps_its_place_in_time() -> None:
    (middle,) = parts([clocked("a", 1000.0)], 1010.0, 1020.0)
    assert (middle.began_wall_s, len(middle.values)) == (1010.0, 10)
    assert parts([clocked("a", 1000.0)], 0.0, 999.0) == []
    assert len(parts([series("x")], 0.0, 1.0)) == 1, "without calendar time nothing is cut"


def test_recordings_left_out_for_checking_are_not_fitted() -> None:
    everything = [series("m", str(i)) for i in range(10)]
    fitted, check = split_recordings(everything, 0.2, seed=1)
    assert (len(fitted), len(check)) == (8, 2)
    assert not {s.recording for s in fitted} & {s.recording for s in check}


def test_a_made_up_series_depends_on_its_number_only() -> None:
    (whole,) = made_up_pieces(3, 240, seed=1)
    (last,) = made_up_pieces(1, 240, seed=1, first=2)
    assert np.array_equal(whole.truth[-2:], last.truth)
    assert np.allclose(whole.inputs[-2:], last.inputs, atol=1e-3)


def test_pieces_are_drawn_as_their_weights_say_and_each_once_where_they_are_equal() -> None:
    rng = np.random.default_rng(0)
    assert sorted(drawn(np.ones(17), rng)) == list(range(17))
    weight = np.array([1.0] * 90 + [3.0] * 10)
    counts = np.bincount(np.concatenate([drawn(weight, rng) for _ in range(200)]), minlength=100) / 200
    assert counts[:90].mean() == pytest.approx(100 / 120, rel=0.02)
    assert counts[90:].mean() == pytest.approx(300 / 120, rel=0.02)
    assert not np.array_equal(drawn(weight, rng), np.sort(drawn(weight, rng)))


def test_a_small_source_weighs_more_but_not_as_much_as_a_large_one() -> None:
    assert source_weight(100, 100) == 1.0
    assert source_weight(25, 100) == 2.0
    assert source_weight(1, 10**6) == 8.0
    small, large = [series("a", source="small")], [series(f"m{i}", seed=i, source="large") for i in range(4)]
    assert sorted(set(pieces(small + large, 0, 60, 1).weight.tolist())) == [1.0, 2.0]


def test_a_larger_log_takes_fewer_epochs_not_more_steps() -> None:
    config = TrainConfig(epochs=20, steps=3000, batch=16)
    assert config.for_pieces(480).epochs == 20
    assert config.for_pieces(4200).epochs == 11
    assert config.for_pieces(10**6).epochs == 3


@pytest.mark.parametrize("bad", [{"epochs": 0}, {"batch": 0}, {"piece": 5}, {"learning_rate": 5.0}, {"steps": 0}])
def test_a_setting_out_of_bounds_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"train\.{next(iter(bad))} = "):
        TrainConfig(**bad)  # type: ignore[arg-type]


def resting(machine: str, load: float, seed: int = 0) -> Series:
    one = series(machine, seed=seed)
    one.values[:, 0] = load
    return one


def test_cold_instants_weigh_four_times_in_the_loss() -> None:
    """Two pieces, one of rest and one of work: the loss is their mean, the cold one counted four times."""
    assert TrainConfig().cold_weight == 4.0
    rest = pieces_of([resting("a", 0.1)], np.ones(3, np.float32), 150)
    work = pieces_of([resting("b", 0.9, seed=1)], np.ones(3, np.float32), 150)
    assert rest.cold[0, 4:150].all()
    assert not rest.cold[0, :4].any(), "there were not 5 s of quiet yet"
    assert not work.cold.any()
    torch.manual_seed(0)
    net = ForecastNet(SHAPE)

    def loss(part: Pieces, weight: float) -> float:
        data = tensors_of(part, "cpu")
        config = TrainConfig(cold_weight=weight)
        return float(loss_of(net, data, config).detach())

    known = [part.known.sum(axis=(2, 3))[0] for part in (rest, work)]
    weights = [float((known[0] * np.where(rest.cold[0], 4.0, 1.0)).sum()), float(known[1].sum())]
    alone = [loss(rest, 4.0), loss(work, 4.0)]
    assert loss(join([rest, work]), 4.0) == pytest.approx(np.average(alone, weights=weights), rel=1e-4)
    assert loss(work, 4.0) == pytest.approx(loss(work, 1.0)), "where nothing is cold the weight changes nothing"
    assert weights[0] > 3.5 * weights[1]


def test_a_net_of_extended_channels_trains_on_recordings_with_and_without_them() -> None:
    one = series("a")
    more = np.random.default_rng(0).random((150, len(EXTENDED))).astype(np.float32)
    both = [replace(one, extended=more), series("b", seed=1)]
    data = pieces(both, 2, 60, 1, extended=True)
    assert data.inputs.shape[-1] == N_EXTENDED_FEATURES
    known = data.inputs[:, :, 0, N_EXTENDED_FEATURES - len(EXTENDED) :]
    assert {True, False} == {bool(piece.any()) for piece in known}, "what a recording lacks is masked"
    torch.manual_seed(1)
    net, seen = ForecastNet(LstmConfig(features=N_EXTENDED_FEATURES, hidden=8, mlp=8)), list[Progress]()
    fit(net, data, TrainConfig(epochs=2, piece=60, batch=4, extended=True), None, seen.append)
    assert all(np.isfinite(p.loss) for p in seen)


def test_the_device_is_chosen_by_name_and_one_that_is_not_there_is_refused() -> None:
    assert device_of("cpu") == "cpu"
    assert device_of("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match=r"train\.device = 'tpu': must be auto, cpu or cuda"):
        device_of("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"train\.device = 'cuda': torch finds no CUDA device"):
            device_of("cuda")


def test_the_data_of_a_run_are_laid_down_once_and_batches_are_cut_from_them(data: Pieces) -> None:
    laid = tensors_of(data, "cpu")
    assert laid["inputs"].data_ptr() == torch.as_tensor(data.inputs).data_ptr(), "on a CPU nothing is copied"
    order = np.array([3, 0, 2, 1])
    first, second = batches(laid, order, 2, "cpu")
    assert np.array_equal(first["truth"].numpy(), data.truth[[3, 0]])
    assert np.array_equal(second["cold"].numpy(), data.cold[[2, 1]])
    assert sum(len(b["inputs"]) for b in batches(laid, np.arange(5) % len(data), 4, "cpu")) == 5


def test_in_bfloat16_the_loss_is_the_same_but_for_rounding(data: Pieces) -> None:
    torch.manual_seed(0)
    net, laid = ForecastNet(SHAPE), tensors_of(data, "cpu")
    exact = float(loss_of(net, laid, CONFIG).detach())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss_of(net, laid, CONFIG)
    assert rounded.dtype == torch.float32
    assert float(rounded.detach()) == pytest.approx(exact, rel=0.02)
    torch.autograd.backward(rounded)
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_rows_are_timed_on_every_device_here(capsys: pytest.CaptureFixture[str]) -> None:
    featurised_per_s, timings = time_rows(2_000)
    assert featurised_per_s > 0
    assert len(timings) == 1 + torch.cuda.is_available()
    assert all(t.rows == 9 * 240 and t.rows_per_s > 0 for t in timings), "whole pieces of 240 rows"
    show((featurised_per_s, timings))
    assert ("No accelerator is present" in capsys.readouterr().out) == (not torch.cuda.is_available())
