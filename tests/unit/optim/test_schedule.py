"""Learning-rate schedules at their corners."""

import itertools
import math
import subprocess
import sys

import pytest

from megatron_bit.config import load_config
from megatron_bit.optim.schedule import learning_rate


def rates(*overrides, steps=100, beyond=0):
    config = load_config(overrides=["optim.lr=2.0", "optim.warmup_steps=10", f"train.steps={steps}", *overrides])
    return [learning_rate(config, step) for step in range(steps + beyond)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_warmup_is_linear_and_reaches_the_peak(schedule):
    lr = rates(f"optim.schedule={schedule}")
    assert lr[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert lr[10] == max(lr) == 2.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(lr[10:]))


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_floor_at_the_end_and_beyond(schedule, ratio):
    lr = rates(f"optim.schedule={schedule}", f"optim.min_lr_ratio={ratio}", beyond=50)
    assert lr[100:] == pytest.approx([2.0 * ratio] * 50)
    assert min(lr[10:]) >= 2.0 * ratio - 1e-12


def test_cosine_half_way():
    lr = rates("optim.min_lr_ratio=0.1")
    assert lr[55] == pytest.approx(0.2 + 1.8 / 2)
    assert lr[10 + 30] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi / 3)) / 2)


def test_wsd_is_flat_and_then_linear():
    lr = rates("optim.schedule=wsd", "optim.decay_fraction=0.25", "optim.min_lr_ratio=0.0")
    assert set(lr[10:76]) == {2.0}
    assert lr[76:] == pytest.approx([2.0 * (100 - step) / 25 for step in range(76, 100)])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_corners(schedule):
    """No warm-up, warm-up as long as or longer than the run, one step, a decay over the whole run."""
    key = f"optim.schedule={schedule}"
    assert rates(key, "optim.warmup_steps=0")[0] == 2.0
    assert rates(key, "optim.warmup_steps=100")[-1] == 2.0
    assert rates(key, "optim.warmup_steps=1000")[-1] == 2.0
    assert rates(key, "optim.warmup_steps=0", steps=1) == [2.0]
    whole = rates(key, "optim.decay_fraction=1.0", beyond=1)
    assert whole[9] == 2.0 and whole[100] == pytest.approx(0.2)


def test_imports_no_torch():
    code = "import sys, megatron_bit.optim.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
