"""Class weights that the backward steps, in float32 and bfloat16: results, refused options, changes of both, and kills at random moments."""

import contextlib
import dataclasses
import random
import signal
import time

import pytest
import torch
from forks import run_command
from training_runs import assert_same_state

from fused_margin.trainer.config import MAX_SEED, TrainConfig
from fused_margin.trainer.config_values import overlay
from fused_margin.trainer.train.auxiliary import AuxiliaryConfig
from fused_margin.trainer.train.checkpoint import FILE_NAME, load_checkpoint
from fused_margin.trainer.train.loop import Trainer
from fused_margin.trainer.train.named_losses import LOSSES, LossConfig

WITH_CLASS_WEIGHTS = [name for name, named in LOSSES.items() if named.has_class_weights]

pytestmark = pytest.mark.usefixtures("blank_pictures")

EXCLUSIVE = {
    "arcface": LossConfig("arcface", 0.2, 16.0, 1.0),
    "sphereface": LossConfig("sphereface", 1.35, exclusive_weight=1.0),
    "certified": LossConfig("arcface", 0.2, 16.0, 1.0, {"exclusive_refresh": "certified"}),
    "auxiliary": LossConfig("arcface", 0.2, 16.0, companions=AuxiliaryConfig(center=0.01, ring=0.01, triplet=0.1)),
}
QUICK = ("arcface", "sphereface")


def choose(config, in_backward=None, weight_dtype="float32", **optimizer):
    """The configuration with other class weights."""
    return dataclasses.replace(
        config,
        loss=dataclasses.replace(config.loss, weight_dtype=weight_dtype),
        optimizer=dataclasses.replace(config.optimizer, in_backward=in_backward, **optimizer),
    )


def train_steps(config, splits, steps=5, state=None):
    trainer = Trainer(config, splits)
    if state is not None:
        trainer.load_state_dict(state)
    losses = []
    for _ in range(steps):
        rows = [(64 * trainer.step + k) % len(splits.train) for k in range(64)]
        batch = splits.train.__getitems__(rows)
        losses.append(trainer.train_step(batch.images, batch.labels).loss)
        trainer.step += 1
    return trainer, torch.stack(losses)


def assert_close(ours, theirs):
    """Equality to 1e-5 of the norm of each tensor."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, dict):
            assert_close(value, theirs[name])
        else:
            assert (value.double() - theirs[name].double()).norm() <= 1e-5 * theirs[name].double().norm(), name


def trained(trainer):
    """The state of the model without the cache of nearest classes, whose codes are rounded."""
    return {name: value for name, value in trainer.model.state_dict().items() if ".exclusive." not in name}


@pytest.mark.parametrize(
    "name",
    [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in sorted({*WITH_CLASS_WEIGHTS, *EXCLUSIVE} - {*QUICK}))],
)
def test_results_match_those_of_the_ordinary_step(tiny_config, splits, name):
    config = dataclasses.replace(tiny_config, loss=EXCLUSIVE.get(name) or LossConfig.small_data(name))
    ours, losses = train_steps(choose(config, True), splits)
    ordinary, expected = train_steps(choose(config, False), splits)
    assert ours.criterion.loss_fn.weight.grad is None and ordinary.criterion.loss_fn.weight.grad is not None
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    assert_close(trained(ours), trained(ordinary))
    assert_close(ours.optimizer.state_dict()["state"], ordinary.optimizer.state_dict()["state"])


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({}, None),
        ({"precision": "bf16-mixed", "devices": 2}, None),
        ({"loss": {"companions": {"center": 0.1, "triplet": 0.1}}}, None),
        ({"loss": {"name": "softmax"}}, None),
        ({"loss": {"exclusive_weight": 1.0, "options": {"exclusive_refresh": 3}}}, None),
        ({"loss": {"name": "triplet"}}, "loss.name triplet, which has none"),
        ({"accumulate": 2}, "accumulate 2"),
        ({"precision": "16-mixed"}, "precision 16-mixed"),
        ({"loss": {"companions": {"intra": 0.5}}}, "loss.companions.intra 0.5"),
        ({"loss": {"companions": {"inter": 1.0}}}, "loss.companions.inter 1.0"),
        ({"loss": {"companions": {"uniform": 0.1}}}, "loss.companions.uniform 0.1"),
        ({"loss": {"name": "l2-softmax", "exclusive_weight": 1.0}}, "loss.exclusive_weight 1.0 of l2-softmax"),
    ],
)
def test_automatic_choice_and_refused_options(changes, obstacle):
    config = overlay(TrainConfig(), changes)
    assert config.steps_in_backward == (obstacle is None)
    assert not choose(config, False).steps_in_backward
    if obstacle is None:
        assert choose(config, True).steps_in_backward
        return
    with pytest.raises(ValueError, match=f"optimizer.in_backward: the backward cannot .* with {obstacle}$"):
        choose(config, True)


@pytest.mark.parametrize(
    "name", ["arcface", *(pytest.param(n, marks=pytest.mark.slow) for n in WITH_CLASS_WEIGHTS if n != "arcface")]
)
def test_bfloat16_class_weights(tiny_config, splits, name):
    config = dataclasses.replace(tiny_config, loss=LossConfig.small_data(name))
    exact, _ = train_steps(config, splits)
    weights = []
    for in_backward, stochastic in ((None, True), (None, True), (None, False), (False, True)):
        chosen = choose(config, in_backward, "bfloat16", stochastic_rounding=stochastic)
        trainer, losses = train_steps(chosen, splits)
        weight = trainer.criterion.loss_fn.weight
        state = trainer.optimizer.optimizer.state[weight]
        assert losses.isfinite().all() and weight.dtype == state["momentum_buffer"].dtype == torch.bfloat16
        assert state.get("step") == (5 if stochastic and in_backward is None else None)
        others = [p for p in trainer.model.parameters() if p is not weight]
        assert {p.dtype for p in others} == {trainer.class_weight.dtype} == {torch.float32}
        torch.testing.assert_close(trainer.class_weight, exact.class_weight, rtol=0.1, atol=0.05)
        weights.append(weight.detach())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(weights[2], weights[3]) or not torch.equal(weights[0], weights[3])


@pytest.mark.parametrize("refresh", [3, "certified"])
def test_bfloat16_class_weights_with_a_cache_of_nearest_classes(tiny_config, splits, refresh):
    loss = LossConfig("arcface", 0.2, 16.0, 1.0, {"exclusive_refresh": refresh})
    config = choose(dataclasses.replace(tiny_config, loss=loss), None, "bfloat16")
    uninterrupted, _ = train_steps(config, splits)
    stopped, _ = train_steps(config, splits, 2)
    resumed, _ = train_steps(config, splits, 3, stopped.state_dict())
    assert_same_state(resumed.state_dict(), uninterrupted.state_dict())


def test_auxiliary_losses_of_bfloat16_class_weights(tiny_config, splits):
    loss = LossConfig("arcface", 0.2, 16.0, companions=AuxiliaryConfig(intra=0.1, inter=0.1, uniform=0.1))
    trainer, losses = train_steps(choose(dataclasses.replace(tiny_config, loss=loss), None, "bfloat16"), splits, 2)
    assert losses.isfinite().all() and trainer.criterion.loss_fn.weight.dtype == torch.bfloat16


def test_largest_seed(tiny_config, splits):
    config = choose(dataclasses.replace(tiny_config, seed=MAX_SEED), None, "bfloat16")
    assert train_steps(config, splits, 1)[1].isfinite().all()


def test_run_changes_between_both_ways(tiny_config, splits):
    """A checkpoint of either is one of the other, and one of an older version has no number of steps."""
    for dtype in ("float32", "bfloat16"):
        config = choose(tiny_config, False, dtype)
        older, _ = train_steps(config, splits, 2)
        state = older.state_dict()
        number = older._sharded_parameters()["criterion.loss_fn.weight"]
        assert "step" not in state["optimizer"]["state"][number]
        ours = choose(config, True, dtype)
        assert config.differences(ours) == []
        trainer, _ = train_steps(ours, splits, 3, state)
        state = trainer.state_dict()
        assert state["optimizer"]["state"][number].get("step") == (3 if dtype == "bfloat16" else None)
        trainer, _ = train_steps(config, splits, 1, state)
        trainer, losses = train_steps(ours, splits, 1, trainer.state_dict())
        assert losses.isfinite().all()
        assert trainer.state_dict()["optimizer"]["state"][number].get("step") == (4 if dtype == "bfloat16" else None)
        assert state["optimizer"]["state"][number].get("step") == (3 if dtype == "bfloat16" else None)  # not shared


def test_early_checkpoints_get_the_defaults():
    values = TrainConfig.defaults("digits").to_dict()
    del values["loss"]["weight_dtype"], values["optimizer"]["in_backward"], values["optimizer"]["stochastic_rounding"]
    assert TrainConfig.from_dict(values) == TrainConfig.defaults("digits")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_run_killed_at_random_moments_continues_exactly(forks, tiny_options, tmp_path, dtype):
    forks.preload("fused_margin.trainer.train.run")
    options = [*tiny_options, "--epochs", "10", "--checkpoint-every", "2", "--loss.weight-dtype", dtype]
    options += ["--optimizer.in-backward", "True"]

    def start(name):
        resume = ["--resume"] if (tmp_path / name / FILE_NAME).exists() else options
        return forks.start(run_command, "train", *resume, "--output", str(tmp_path / name))

    def saved_step():
        path = tmp_path / "killed" / FILE_NAME
        return load_checkpoint(path)["step"] if path.exists() else 0

    process = start("uninterrupted")
    assert process.wait() == 0, process.output
    draw, steps = random.Random(dtype), []
    for _ in range(6):
        process, goal = start("killed"), saved_step() + draw.randrange(1, 7)
        while saved_step() < goal and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.05))
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            break  # it ended before
        steps.append(saved_step())
    assert len(set(steps)) > 1  # killed in the midst of training
    process = start("killed")
    assert process.wait() == 0, process.output
    assert_same_state(*(load_checkpoint(tmp_path / name / FILE_NAME) for name in ("killed", "uninterrupted")))
