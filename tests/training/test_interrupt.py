"""Ctrl-C and SIGTERM: a checkpoint of the step in hand, one exception, and the same weights after a resume."""

from __future__ import annotations

import signal
import threading

import pytest
from toy_run import SignalAfter, ToyData, resumed_run, toy_trainer, weights_hash

from switchkd.training import Interrupted, checkpoints, interrupt, latest_checkpoint


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Six steps over seven samples: an epoch is two steps."""
    return resumed_run(tmp_path_factory.mktemp("whole"))


def interrupted(folder, *signals, **settings):
    trainer = toy_trainer(folder, samples=7, gradient_accumulation_steps=2, callbacks=signals, **settings)
    with pytest.raises(Interrupted) as stop:
        trainer.train()
    return trainer, stop.value


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("taken", "settings"),
    [(0, {}), (2, {"checkpoint_every": 0}), (3, {}), (5, {"keep_checkpoints": 1, "logging_steps": 4})],
)
def test_an_interrupted_run_ends_bit_for_bit_like_the_whole_one(tmp_path, whole_run, number, taken, settings):
    trainer, stop = interrupted(tmp_path, SignalAfter(taken, number), **settings)
    assert stop.step == trainer.state.global_step == taken + 1
    assert stop.checkpoint == tmp_path / f"checkpoint-{taken + 1}" == latest_checkpoint(tmp_path)
    assert str(stop) == f"after step {taken + 1}, which {stop.checkpoint} keeps"
    assert checkpoints.flaw(stop.checkpoint) is None
    assert isinstance(stop, KeyboardInterrupt)
    resumed = resumed_run(tmp_path, **settings)
    assert weights_hash(resumed.method) == weights_hash(whole_run.method)
    assert len(resumed.method.fractions) < 12


def test_it_is_said_at_once_and_the_bar_is_closed(tmp_path, capfd):
    trainer, _ = interrupted(tmp_path, SignalAfter(1), disable_tqdm=False)
    assert "SIGINT: a checkpoint follows after this step; once more ends at once, without one" in capfd.readouterr().err
    assert [bar for bar in trainer.callback_handler.callbacks if getattr(bar, "training_bar", None)] == []


def test_one_press_that_a_launcher_hands_on_is_one(tmp_path):
    assert interrupted(tmp_path, SignalAfter(1, times=3))[1].step == 2


def test_a_second_press_ends_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(interrupt, "SAME_PRESS", -1.0)
    trainer = toy_trainer(tmp_path, callbacks=[SignalAfter(1, times=2)])
    with pytest.raises(KeyboardInterrupt) as stop:
        trainer.train()
    assert not isinstance(stop.value, Interrupted)
    assert trainer.state.global_step == 1
    assert latest_checkpoint(tmp_path) is None


def test_an_interruption_in_an_evaluation_ends_after_it(tmp_path, whole_run):
    class Press(SignalAfter):
        def on_step_begin(self, *given, **kwargs):
            pass

        def on_prediction_step(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control)

    settings = {"eval_strategy": "steps", "eval_steps": 3, "eval_dataset": ToyData(5), "checkpoint_every": 0}
    _, stop = interrupted(tmp_path, Press(3), **settings)
    assert stop.step == 3
    assert weights_hash(resumed_run(tmp_path, **settings).method) == weights_hash(whole_run.method)


def test_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in interrupt.SIGNALS]
    toy_trainer(tmp_path / "a", steps=1).train()
    interrupted(tmp_path / "b", SignalAfter(1))
    assert [signal.getsignal(number) for number in interrupt.SIGNALS] == before


def test_an_ignored_signal_stays_ignored(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and a shell's & do
    try:
        trainer = toy_trainer(tmp_path, steps=2, callbacks=[SignalAfter(1)])
        trainer.train()
        assert trainer.state.global_step == 2
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_in_another_thread_has_no_handlers(tmp_path):
    trainer = toy_trainer(tmp_path, steps=1, checkpoint_every=0)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1
