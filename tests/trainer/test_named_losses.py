"""Losses chosen by name: their papers' settings, a step of each in bounded memory, auxiliary losses, and resuming."""

import dataclasses
import math

import pytest
import torch
import tyro
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from training_runs import StoppedTrainer, assert_same_state, fit

import fused_margin as fm
from fused_margin.commands.train import parse
from fused_margin.trainer.config import TrainConfig
from fused_margin.trainer.train.auxiliary import ARGUMENTS, AuxiliaryConfig
from fused_margin.trainer.train.checkpoint import FILE_NAME, load_checkpoint
from fused_margin.trainer.train.criterion import Criterion, class_directions, stored_class_weight
from fused_margin.trainer.train.interrupts import Interrupted
from fused_margin.trainer.train.loop import Trainer
from fused_margin.trainer.train.named_losses import LOSSES, SMALL_DATA, LossConfig, make_loss

# Settings of the papers; for margin losses m1, m2 and m3 in cos(m1 * theta + m2) - m3.
PAPERS = {
    "softmax": (fm.SoftmaxLoss, {"bias": "learned"}),
    "modified-softmax": (fm.ModifiedSoftmaxLoss, {"m1": 1, "m2": 0, "m3": 0, "scale": None}),
    "l2-softmax": (fm.L2SoftmaxLoss, {"alpha": "learned", "bias": "learned"}),
    "l-softmax": (fm.LSoftmaxLoss, {"m1": 4, "m2": 0, "m3": 0, "annealing": True, "bias": None}),
    "cm1": (fm.CombinedMarginLoss, {"m1": 1, "m2": 0.3, "m3": 0.2, "scale": 64}),
    "cm2": (fm.CombinedMarginLoss, {"m1": 0.9, "m2": 0.4, "m3": 0.15, "scale": 64}),
    "curricularface": (fm.CurricularFaceLoss, {"m1": 1, "m2": 0.5, "m3": 0, "scale": 64, "momentum": 0.01}),
    "subcenter-arcface": (fm.SubCenterArcFaceLoss, {"m1": 1, "m2": 0.5, "m3": 0, "scale": 64, "sub_centers": 3}),
    "normface": (fm.NormFaceLoss, {"m1": 1, "m2": 0, "m3": 0, "scale": 64}),
    "sphereface": (fm.SphereFaceLoss, {"m1": 4, "m2": 0, "m3": 0, "scale": None, "annealing": True}),
    "cosface": (fm.CosFaceLoss, {"m1": 1, "m2": 0, "m3": 0.35, "scale": 64}),
    "am-softmax": (fm.AMSoftmaxLoss, {"m1": 1, "m2": 0, "m3": 0.35, "scale": 30}),
    "coco": (fm.CoCoLoss, {"m1": 1, "m2": 0, "m3": 0, "scale": math.log(29 / math.expm1(1e-4))}),
    "vmf": (fm.VMFLoss, {"m1": 1, "m2": 0, "m3": 0, "kappa": 16, "scale": 16}),
    "arcface": (fm.ArcFaceLoss, {"m1": 1, "m2": 0.5, "m3": 0, "scale": 64}),
    "combined": (fm.CombinedMarginLoss, {"m1": 1, "m2": 0.3, "m3": 0.2, "scale": 64}),
    "adaface": (fm.AdaFaceLoss, {"margin": 0.4, "concentration": 0.333, "momentum": 0.01, "scale": 64}),
    "magface": (fm.MagFaceLoss, {"margins": (0.45, 0.8), "norms": (10, 110), "norm_weight": 35, "scale": 64}),
    "elasticface": (fm.ElasticFaceLoss, {"margin": 0.5, "std": 0.05, "by_difficulty": False, "kind": "arc", "scale": 64}),
    "elasticface-plus": (
        fm.ElasticFaceLoss,
        {"margin": 0.5, "std": 0.0175, "by_difficulty": True, "kind": "arc", "scale": 64},
    ),
    "triplet": (fm.TripletLoss, {"margin": 0.2, "mining": "semihard", "distance": "squared", "normalize": True}),
    "angular-triplet": (fm.AngularTripletLoss, {"margin": 0.35, "mining": "semihard", "distance": "angle"}),
    "contrastive": (fm.ContrastiveLoss, {"margin": 1, "positive_margin": 0, "form": "hadsell", "average": "separate"}),
    "siamese-l1": (fm.SiameseL1Loss, {"normalize": True, "balanced": True, "alpha": "learned", "bias": "learned"}),
}  # fmt: skip


WITH_CLASS_WEIGHTS = [name for name, named in LOSSES.items() if named.has_class_weights]
WITHOUT_CLASS_WEIGHTS = [name for name in LOSSES if name not in WITH_CLASS_WEIGHTS]


def batch(samples, classes, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(samples, size, generator=generator).requires_grad_()
    return embeddings, torch.randint(0, classes, (samples,), generator=generator)


def test_every_name_has_its_papers_settings():
    assert PAPERS.keys() == LOSSES.keys()
    for name, (module, settings) in PAPERS.items():
        loss_fn = make_loss(LossConfig(name), 30, 8)
        assert type(loss_fn) is module
        for setting, value in settings.items():
            owner = loss_fn.margin_function if setting in ("m1", "m2", "m3") else loss_fn
            actual = getattr(owner, setting)
            assert ("learned" if isinstance(actual, torch.nn.Parameter) else actual) == value, (name, setting)
        assert getattr(loss_fn, "exclusive_weight", 0.0) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_step_updates_network_and_class_weights(tiny_config, splits, name):
    loss = LossConfig.small_data(name)
    trainer = Trainer(dataclasses.replace(tiny_config, loss=loss), splits)
    images, labels = splits.train.images[:64], splits.train.labels[:64]
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train_step(images, labels)
    moved = {key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])}
    assert {key for key, _ in trainer.model.named_parameters()} <= moved
    loss = trainer.model.criterion.last_parts[name]
    assert loss.isfinite() and loss > 0
    if name in WITH_CLASS_WEIGHTS:
        assert trainer.class_weight.shape == (7, 8)
        weight = trainer.model.criterion.loss_fn.weight
        assert torch.allclose(weight.norm(dim=1), torch.ones(len(weight))) == LOSSES[name].projected
    else:
        assert trainer.class_weight is None and not trainer.config.steps_in_backward
    for trained in trainer.model.criterion.plain_parameters():
        group = next(g for g in trainer.optimizer.param_groups if any(p is trained for p in g["params"]))
        assert not group["project"] and (group["weight_decay"] > 0) == (trained.dim() > 1)


@pytest.mark.parametrize("name", WITH_CLASS_WEIGHTS)
def test_step_never_stores_the_logits(name):
    samples, classes, size = 64, 5000, 8
    config = LossConfig(name, options={"workspace_mb": 0.5})
    criterion = Criterion(config, classes, size)
    x, y = batch(samples, classes, size)
    assert largest_allocation(lambda: criterion(x, y).backward()) < samples * classes * 4 // 2


@pytest.mark.slow
def test_auxiliary_losses_never_store_the_cosines():
    samples, classes, size = 64, 2000, 8
    everything = AuxiliaryConfig(**dict.fromkeys(ARGUMENTS, 1.0), triplet_mining="all")
    criterion = Criterion(LossConfig(options={"workspace_mb": 0.25}, companions=everything), classes, size)
    x, y = batch(samples, classes, size)
    y = y % 30  # with triplets
    assert largest_allocation(lambda: criterion(x, y).backward()) < samples * classes * 4


def test_largest_allocation():
    x, y = batch(64, 5000, 8)
    weight = torch.randn(5000, 8, requires_grad=True)
    assert largest_allocation(lambda: F.cross_entropy(x @ weight.t(), y).backward()) >= 64 * 5000 * 4


def largest_allocation(step):
    """Bytes of the largest tensor that an operator of the step allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return max(event.self_cpu_memory_usage for event in profiler.events())


STATEFUL = {
    "sphereface": LossConfig("sphereface", margin=1.35),
    "curricularface": LossConfig("curricularface", margin=0.2, scale=16.0),
    "l2-softmax": LossConfig("l2-softmax"),
    "adaface": LossConfig("adaface", scale=16.0),
    "elasticface": LossConfig("elasticface", margin=0.2, scale=16.0),
    "auxiliary": LossConfig(
        margin=0.2,
        scale=16.0,
        companions=AuxiliaryConfig(
            center=0.01,
            ring=0.01,
            inter=0.1,
            uniform=0.1,
            triplet=0.1,
            contrastive=0.1,
            range=0.1,
            marginal=0.1,
            center_invariant=0.001,
            angular_triplet=0.1,
            deepid2=0.01,
        ),
    ),
}


@pytest.mark.parametrize(
    "name",
    ["adaface", "auxiliary", *(pytest.param(name, marks=pytest.mark.slow) for name in STATEFUL if name[0] != "a")],
)
def test_resumed_run_matches_uninterrupted_run(tiny_config, splits, tmp_path, name, console):
    config = dataclasses.replace(tiny_config, epochs=1, loss=STATEFUL[name])
    uninterrupted = fit(dataclasses.replace(config, output=tmp_path / "uninterrupted"), splits, console)

    def stop():
        raise Interrupted

    config = dataclasses.replace(config, checkpoint_every=7)
    with pytest.raises(Interrupted):
        fit(config, splits, console, trainer=StoppedTrainer(config, splits, 12, stop))
    state = load_checkpoint(config.output / FILE_NAME)
    assert state["step"] == 7
    assert TrainConfig.from_dict(state["config"]) == config
    torch.manual_seed(99)
    assert_same_state(fit(config, splits, console, state=state).state_dict(), uninterrupted.state_dict())


def test_sum_of_parts():
    everything = AuxiliaryConfig(**{name: 0.1 * (i + 1) for i, name in enumerate(ARGUMENTS)})
    config = LossConfig("cosface", companions=everything)
    criterion = Criterion(config, 12, 8).eval()
    x, y = batch(32, 12, 8)
    total = criterion(x, y)
    parts = criterion.last_parts
    assert list(parts) == ["cosface", *ARGUMENTS] and not any(part.requires_grad for part in parts.values())
    torch.testing.assert_close(total.detach(), sum(parts.values()))
    weight = criterion.loss_fn.weight
    unweighted = {
        "center": x.square().sum(1).mean() / 2,  # the centers start at 0
        "ring": (x.norm(dim=1) - x.norm(dim=1).mean()).square().mean() / 2,
        "intra": fm.IntraLoss()(x, weight, y),
        "inter": fm.InterLoss()(weight, y),
        "uniform": fm.UniformLoss()(weight),
        "range": fm.RangeLoss()(x, y),
        "marginal": fm.MarginalLoss()(x, y),
        "center_invariant": torch.tensor(0.0),  # all centers have a norm of 0
        "siamese": fm.SiameseL1Loss(8)(x, y),
    }
    expected = {name: getattr(everything, name) * value for name, value in unweighted.items()}
    expected["cosface"] = criterion.loss_fn(x, y)
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value.detach(), msg=name)


def test_half_precision_embeddings():
    """With half-precision embeddings, as from mixed precision, within autocast: losses are computed in float32."""
    everything = AuxiliaryConfig(**dict.fromkeys(ARGUMENTS, 1.0))
    criterion = Criterion(LossConfig(companions=everything), 12, 8).eval()
    x, y = batch(32, 12, 8)
    half = x.detach().bfloat16()
    criterion(half.float(), y)
    expected = criterion.last_parts
    with torch.autocast("cpu", torch.bfloat16):
        criterion(half, y)
    for name, part in criterion.last_parts.items():
        torch.testing.assert_close(part, expected[name], msg=name)


def distances(x):
    return (x[:, None] - x[None]).norm(dim=2)


@pytest.mark.parametrize(("mining", "lowest", "highest"), [("all", -9, 0.2), ("hard", -9, 0), ("semihard", 0, 0.2)])
def test_triplets(mining, lowest, highest):
    """ArcFace with triplets: FaceNet's formula over the mined triplets."""
    x, y = batch(24, 6, 8)
    d = distances(F.normalize(x.detach(), dim=1)) ** 2
    losses = [
        (d[a, p] - d[a, n] + 0.2).item()
        for a in range(24)
        for p in range(24)
        for n in range(24)
        if a != p and y[a] == y[p] and y[a] != y[n] and lowest < d[a, n] - d[a, p] <= highest
    ]
    assert len(losses) > 20
    auxiliary = AuxiliaryConfig(triplet=0.5, triplet_mining=mining)
    criterion = Criterion(LossConfig("arcface", companions=auxiliary), 6, 8)
    criterion(x, y).backward()
    torch.testing.assert_close(
        criterion.last_parts["triplet"].item(), 0.5 * sum(losses) / len(losses), rtol=1e-5, atol=0
    )
    assert x.grad.norm() > 0


@pytest.mark.parametrize("margins", [(0.0, 1.0), (0.5, 1.5)])
def test_pairs(margins):
    """DeepID2's formula over all pairs with a nonzero loss."""
    x, y = batch(24, 6, 8)
    d = distances(F.normalize(x.detach(), dim=1))
    positive, negative = margins
    same = (y[:, None] == y[None]) & ~torch.eye(24, dtype=torch.bool)
    near = (d[same] - positive).clamp(min=0) ** 2 / 2
    far = (negative - d[y[:, None] != y[None]]).clamp(min=0) ** 2 / 2
    expected = near[near > 0].mean() + far[far > 0].mean()
    auxiliary = AuxiliaryConfig(contrastive=0.05, contrastive_margins=margins)
    criterion = Criterion(LossConfig(companions=auxiliary), 6, 8)
    criterion(x, y).backward()
    torch.testing.assert_close(criterion.last_parts["contrastive"], 0.05 * expected)


def test_settings_of_range_and_marginal_loss():
    x, y = batch(24, 6, 8)
    settings = {"range_k": 3, "range_margin": 30.0, "range_alpha": 0.2, "range_beta": 0.1}
    settings |= {"marginal_theta": 1.0, "marginal_xi": 0.1}
    criterion = Criterion(LossConfig(companions=AuxiliaryConfig(range=2.0, marginal=1.0, **settings)), 6, 8)
    criterion(x, y)
    torch.testing.assert_close(criterion.last_parts["range"], 2 * fm.RangeLoss(3, 30.0, 0.2, 0.1)(x, y).detach())
    torch.testing.assert_close(criterion.last_parts["marginal"], fm.MarginalLoss(1.0, 0.1)(x, y).detach())


def test_images_of_each_class_are_counted(tiny_config, splits):
    companions = AuxiliaryConfig(center=0.01, center_invariant=1.0)
    trainer = Trainer(dataclasses.replace(tiny_config, loss=LossConfig(companions=companions)), splits)
    loss_fn = trainer.criterion.companions.losses["center_invariant"]
    assert loss_fn.class_counts.sum() == len(splits.train)
    assert torch.equal(loss_fn.class_counts, splits.train.labels.bincount())
    for _ in range(2):
        trainer.train_step(splits.train.images[:64], splits.train.labels[:64])
    assert trainer.criterion.last_parts["center_invariant"] > 0


def test_options_of_the_losses_over_pairs():
    auxiliary = AuxiliaryConfig(
        angular_triplet=2.0,
        angular_triplet_margin=0.3,
        triplet_mining="batch-hard",
        contrastive=3.0,
        contrastive_margins=(0.5, 1.5),
        contrastive_form="double-margin",
        contrastive_normalize=False,
        deepid2=0.05,
    )
    x, y = batch(24, 6, 8)
    criterion = Criterion(LossConfig("softmax", companions=auxiliary), 6, 8)
    criterion(x, y)
    pairs = fm.ContrastiveLoss(1.5, 0.5, form="double-margin", normalize=False, average="separate-nonzero")
    expected = {
        "angular_triplet": 2 * fm.AngularTripletLoss(0.3)(x, y),
        "contrastive": 3 * pairs(x, y),
        "deepid2": 0.05 * fm.DeepID2Loss()(x, y),
    }
    for name, value in expected.items():
        torch.testing.assert_close(criterion.last_parts[name], value.detach(), msg=name)


def test_sub_centers_have_one_direction_per_class():
    weight = torch.tensor([[2.0, 0.0], [0.0, 0.5], [3.0, 4.0], [0.3, 0.4]])  # two classes with two sub-centers each
    expected = torch.tensor([[math.sqrt(0.5), math.sqrt(0.5)], [0.6, 0.8]])
    torch.testing.assert_close(class_directions(weight, 2), expected)
    assert class_directions(weight, 1) is weight


def test_class_weights_of_a_checkpoint():
    for name in WITHOUT_CLASS_WEIGHTS:
        criterion = Criterion(LossConfig(name), 12, 8)
        assert criterion.class_weight is None and not criterion.class_parameters()
        assert stored_class_weight(LossConfig(name), criterion.state_dict()) is None
    for name in WITH_CLASS_WEIGHTS:
        config = LossConfig(name)
        criterion = Criterion(config, 12, 8)
        assert criterion.class_weight.shape == (12, 8) and not criterion.class_weight.requires_grad
        assert torch.equal(stored_class_weight(config, criterion.state_dict()), criterion.class_weight)


def test_defaults_depend_on_data_and_name(face_folder):
    assert TrainConfig.defaults().loss == LossConfig("arcface", 0.2, 16.0, 1.0)
    for name, settings in SMALL_DATA.items():
        assert TrainConfig.defaults("digits", loss=name).loss == LossConfig(name, **settings)
    for name in LOSSES:
        config = TrainConfig.defaults(str(face_folder), loss=name)
        assert config.loss == LossConfig(name)
        assert config.images_per_identity == (0 if name in WITH_CLASS_WEIGHTS else 4)


def test_defaults_of_the_command_line(capsys):
    assert parse(["--loss.name", "cosface", "--output", "here"]).loss == LossConfig("cosface", 0.15, 16.0)
    for words in (["--loss.name", "cosface", "--help"], ["--help", "--loss.name", "cosface", "--resume"]):
        with pytest.raises(SystemExit) as exit_:
            parse(words)
        assert exit_.value.code == 0 and "(default: 0.15)" in capsys.readouterr().out


def test_options_on_the_command_line():
    words = "--loss.options margins=0.3,0.6 norm_weight=10 easy=True --loss.companions.ring 0.01"
    default = LossConfig("magface", options={"norms": (1.0, 30.0)})
    config = tyro.cli(
        TrainConfig, args=words.split(), default=dataclasses.replace(TrainConfig.defaults(), loss=default)
    )
    assert config.loss.options == {"margins": (0.3, 0.6), "norm_weight": 10, "easy": True}
    assert config.loss.companions == AuxiliaryConfig(ring=0.01)
    assert TrainConfig.from_dict(config.to_dict()) == config
    other = dataclasses.replace(config, loss=default)
    assert sum("--loss.options" in difference for difference in config.differences(other)) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "arc"}, "loss.name must be one of"),
        ({"name": "triplet", "scale": 16.0}, "loss.scale: triplet has none"),
        ({"name": "triplet", "exclusive_weight": 1.0}, "loss.exclusive_weight: triplet has none"),
        ({"name": "triplet", "weight_dtype": "bfloat16"}, "loss.weight_dtype: triplet has no class weights"),
        ({"name": "triplet", "companions": AuxiliaryConfig(inter=1.0)}, "loss.companions.inter: triplet has no class"),
        ({"name": "triplet", "options": {"mining": "easy"}}, "loss triplet: mining: expected one of"),
        ({"name": "contrastive", "options": {"reduction": "sum"}}, "contrastive has no option 'reduction'"),
        ({"scale": 0.0}, "loss.scale must be positive"),
        ({"margin": math.inf}, "loss.margin must be finite"),
        ({"exclusive_weight": -1.0}, "loss.exclusive_weight must be"),
        ({"name": "normface", "margin": 0.0}, "loss.margin: normface has none, got 0.0"),
        ({"name": "softmax", "scale": 16.0}, "loss.scale: softmax has none"),
        ({"name": "modified-softmax", "scale": 16.0}, "loss.scale: modified-softmax has none"),
        ({"name": "subcenter-arcface", "exclusive_weight": 1.0}, "loss subcenter-arcface: exclusive_weight"),
        ({"name": "combined", "margin": 0.2}, "loss.margin: combined has none"),
        ({"name": "magface", "margin": 0.2}, "loss.margin: magface has none"),
        ({"options": {"std": 0.1}}, "arcface has no option 'std'; it has beyond_pi, easy"),
        ({"options": {"margin": 0.1}}, "arcface has no option 'margin'"),
        ({"options": {"easy": 1.0}}, "easy of arcface must be True or False, got 1.0"),
        ({"name": "elasticface", "options": {"kind": 3}}, "kind of elasticface must be text, got 3"),
        ({"name": "elasticface", "options": {"std": "x"}}, "std of elasticface must be a number, got 'x'"),
        ({"name": "magface", "options": {"margins": 0.3}}, "margins of magface must be comma-separated numbers"),
        ({"name": "magface", "options": {"margins": (0.6, 0.3)}}, r"loss magface: margins\[1\]: expected"),
        ({"name": "sphereface", "margin": 0.5}, "loss sphereface: margin: expected a number in"),
    ],
)
def test_wrong_configurations(values, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"center": -0.1}, "loss.companions.center must be finite"),
        ({"triplet_margin": math.nan}, "loss.companions.triplet_margin must be finite"),
        ({"range_k": 0}, "loss.companions.range_k must be at least 1, got 0"),
        ({"range_beta": -1.0}, "loss.companions.range_beta must be finite and not negative, got -1.0"),
        ({"marginal_xi": math.inf}, "loss.companions.marginal_xi must be finite"),
        ({"contrastive_margins": (1.0, 0.5)}, "contrastive_margins must be two ascending numbers, got 1.0 0.5"),
    ],
)
def test_wrong_auxiliary_losses(values, message):
    with pytest.raises(ValueError, match=message):
        AuxiliaryConfig(**values)
