"""The stages' training steps on batches made here, without a Trainer."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from depthkit.config import DepthLoss, DPTConfig, OptimConfig, PretrainConfig, StudentConfig, TeacherConfig
from depthkit.evaluation.settings import Alignment, ProtocolConfig
from depthkit.losses import affine_invariant_loss, gradient_matching_loss, scale_shift_invariant_loss
from depthkit.models import DepthModel, build_encoder, build_model
from depthkit.optim import parameter_groups
from depthkit.stages.base import supervised_loss, val_name
from depthkit.stages.pretrain import PretrainModule
from depthkit.stages.student import StudentModule
from depthkit.stages.teacher import TeacherModule
from depthkit.types import Batch, Rejection

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")
MODEL = DPTConfig(
    encoder="vit_tiny_patch16_224",
    encoder_args={"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "init_values": 0.1},
    conv_stem=True,
    tap_layers=[0, 1, 2, 3],
    features=16,
    out_channels=[8, 8, 16, 16],
)
PROTOCOL = ProtocolConfig(name="p", max_depth=80.0, alignment=Alignment.disparity_least_squares)


def model(seed: int = 0) -> DepthModel:
    torch.manual_seed(seed)
    return build_model(MODEL)


def batch(num_images: int, seed: int = 0, **extra: Tensor) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randn(num_images, 3, 32, 32, generator=generator),
        "target": torch.rand(num_images, 32, 32, generator=generator),
        "valid_mask": torch.rand(num_images, 32, 32, generator=generator) < 0.8,
        "key": [str(index) for index in range(num_images)],
        "dataset": ["it"] * num_images,
        "rejections": [],
        **extra,
    }


def student(**settings: Any) -> StudentModule:
    stage = StudentConfig(**settings)
    network = model()
    frozen = copy.deepcopy(network.encoder) if stage.feature_weight > 0 else None
    return StudentModule(network, frozen, stage, OptimConfig(), PROTOCOL)


class Logged(dict):
    """Catches what a module logs."""

    def __init__(self, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "log", lambda name, value, **_: self.update({name: value}))
        monkeypatch.setattr(module, "log_dict", lambda values, **_: self.update(values))


# --- supervised loss -------------------------------------------------------------------------------------------------


def maps() -> tuple[Tensor, Tensor, Tensor]:
    part = batch(3)
    return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(9)), part["target"], part["valid_mask"]


def test_supervised_loss_combines_the_terms_that_are_asked_for():
    for kind, base, drop in (
        (DepthLoss.affine_invariant, affine_invariant_loss, "drop_fraction"),
        (DepthLoss.scale_shift_invariant, scale_shift_invariant_loss, "trim_fraction"),
    ):
        plain = base(*maps(), **{drop: 0.0})
        dropped = base(*maps(), **{drop: 0.1})
        gradient = gradient_matching_loss(*maps())
        assert not torch.allclose(plain, dropped)
        torch.testing.assert_close(supervised_loss(kind)(*maps()), plain)
        torch.testing.assert_close(supervised_loss(kind, drop_fraction=0.1)(*maps()), dropped)
        both = supervised_loss(kind, gradient_matching_weight=2.0, drop_fraction=0.1)(*maps())
        torch.testing.assert_close(both, dropped + 2 * gradient)
        assert both.shape == (3,)


# --- teacher ---------------------------------------------------------------------------------------------------------


def test_teacher_step_is_the_mean_of_its_loss(monkeypatch):
    stage = TeacherConfig(loss=DepthLoss.scale_shift_invariant, gradient_matching_weight=2.0)
    module = TeacherModule(model(), stage, OptimConfig(), PROTOCOL)
    logged = Logged(module, monkeypatch)
    part = batch(4)
    prediction = module(part["image"]).values
    per_image = scale_shift_invariant_loss(prediction, part["target"], part["valid_mask"], trim_fraction=0.0)
    per_image = per_image + 2 * gradient_matching_loss(prediction, part["target"], part["valid_mask"])
    loss = module.training_step({"labeled": part}, 0)["loss"]
    torch.testing.assert_close(loss, per_image.mean())
    assert set(logged) == {"loss", "loss/labeled"}
    assert not logged["loss"].requires_grad


def test_an_image_without_labels_changes_no_gradient():
    module = TeacherModule(model(), TeacherConfig(), OptimConfig(), PROTOCOL)
    part = batch(1)
    module.training_step({"labeled": part}, 0)["loss"].backward()
    expected = [p.grad.clone() for p in module.model.parameters() if p.requires_grad]
    module.zero_grad()
    two = batch(2)
    two["image"][0], two["target"][0], two["valid_mask"][0] = part["image"][0], part["target"][0], part["valid_mask"][0]
    two["valid_mask"][1] = False
    two["target"][1] = torch.nan
    (2 * module.training_step({"labeled": two}, 0)["loss"]).backward()
    for parameter, gradient in zip([p for p in module.model.parameters() if p.requires_grad], expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


# --- student ---------------------------------------------------------------------------------------------------------


def test_student_total_is_the_weighted_mean_of_its_parts(monkeypatch):
    module = student(labeled_weight=1.0, unlabeled_weight=2.0, feature_weight=3.0, tolerance_margin=0.0)
    with torch.no_grad():
        module.frozen_encoder.vit.norm.weight[0] += 5.0  # else it agrees with the student
    logged = Logged(module, monkeypatch)
    labeled, unlabeled = batch(2, seed=1), batch(4, seed=2)
    total = module.training_step({"labeled": labeled, "unlabeled": unlabeled}, 0)["loss"]
    assert set(logged) == {"loss", "loss/labeled", "loss/unlabeled", "loss/feature"}
    parts = {name: logged[f"loss/{name}"] for name in ("labeled", "unlabeled", "feature")}
    torch.testing.assert_close(total, (parts["labeled"] + 2 * parts["unlabeled"] + 3 * parts["feature"]) / 6)

    for name, part in (("labeled", labeled), ("unlabeled", unlabeled)):
        prediction = module(part["image"]).values
        expected = affine_invariant_loss(prediction, part["target"], part["valid_mask"]).mean()
        torch.testing.assert_close(parts[name], expected)
    features = module(unlabeled["image"]).features.detach()
    frozen = module.frozen_encoder(unlabeled["image"])[1]
    cosine = torch.nn.functional.cosine_similarity(features, frozen, dim=1)
    torch.testing.assert_close(parts["feature"], (1 - cosine).mean())
    assert parts["feature"] > 0.01


def test_student_without_labeled_images(monkeypatch):
    """V2: pseudo-labels alone."""
    module = student(drop_fraction=0.1)
    logged = Logged(module, monkeypatch)
    part = batch(4)
    total = module.training_step({"unlabeled": part}, 0)["loss"]
    assert set(logged) == {"loss", "loss/unlabeled", "loss/feature"}
    expected = affine_invariant_loss(
        module(part["image"]).values, part["target"], part["valid_mask"], drop_fraction=0.1
    )
    torch.testing.assert_close(logged["loss/unlabeled"], expected.mean())
    torch.testing.assert_close(total, (expected.mean() + logged["loss/feature"]) / 2)


def test_labeled_images_are_not_trimmed(monkeypatch):
    module = student(drop_fraction=0.5)
    logged = Logged(module, monkeypatch)
    part = batch(2)
    module.training_step({"labeled": part, "unlabeled": part}, 0)["loss"]
    expected = affine_invariant_loss(module(part["image"]).values, part["target"], part["valid_mask"]).mean()
    torch.testing.assert_close(logged["loss/labeled"], expected)
    assert logged["loss/unlabeled"] < logged["loss/labeled"]


def test_order_of_the_streams_does_not_matter():
    module = student()
    labeled, unlabeled = batch(2, seed=1), batch(4, seed=2)
    first = module.training_step({"labeled": labeled, "unlabeled": unlabeled}, 0)["loss"]
    second = module.training_step({"unlabeled": unlabeled, "labeled": labeled}, 0)["loss"]
    torch.testing.assert_close(first, second)


def test_cutmix_regions_are_normalised_apart(monkeypatch):
    """Scaling the target inside the pasted region alone changes nothing: its teacher map has its own scale."""
    module = student(feature_weight=0.0)
    region = torch.zeros(2, 32, 32, dtype=torch.bool)
    region[:, 4:20, 8:30] = True
    part = batch(2, cutmix_region=region)
    before = module.training_step({"unlabeled": part}, 0)["loss"]
    part["target"] = torch.where(region, 7 * part["target"] + 3, part["target"])
    torch.testing.assert_close(module.training_step({"unlabeled": part}, 0)["loss"], before)
    del part["cutmix_region"]
    assert not torch.isclose(module.training_step({"unlabeled": part}, 0)["loss"], before, rtol=1e-2)


def test_frozen_encoder_stays_frozen():
    module = student(tolerance_margin=0.0)
    assert module.train().training
    assert module.model.training
    assert not any(part.training for part in module.frozen_encoder.modules())
    assert module.eval().train() is module
    assert not any(part.training for part in module.frozen_encoder.modules())
    before = {name: tensor.clone() for name, tensor in module.frozen_encoder.state_dict().items()}

    optimizer = torch.optim.SGD(parameter_groups(module.model, module.model.encoder, OptimConfig(encoder_lr=0.1)))
    module.training_step({"labeled": batch(1), "unlabeled": batch(2)}, 0)["loss"].backward()
    optimizer.step()
    assert all(
        parameter.grad is None and not parameter.requires_grad for parameter in module.frozen_encoder.parameters()
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.frozen_encoder.state_dict().items())
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert not trained & set(map(id, module.frozen_encoder.parameters()))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in module.model.encoder.state_dict().items())


def test_feature_loss_pulls_on_the_encoder_alone():
    module = student(labeled_weight=0.0, unlabeled_weight=0.0, tolerance_margin=0.0)
    with torch.no_grad():
        module.frozen_encoder.vit.norm.weight[0] += 5.0
    module.training_step({"labeled": batch(1), "unlabeled": batch(2)}, 0)["loss"].backward()
    assert all(
        not parameter.grad.any() for parameter in module.model.decoder.parameters() if parameter.grad is not None
    )
    assert module.model.encoder.vit.norm.weight.grad.any()


def test_without_feature_weight_there_is_no_frozen_encoder(tiny_config, tmp_path):
    from depthkit.train import build_student

    assert build_student(tiny_config("student", tmp_path, "stage.feature_weight=0")).frozen_encoder is None
    module = build_student(tiny_config("student", tmp_path))
    pairs = zip(module.frozen_encoder.parameters(), module.model.encoder.parameters(), strict=True)
    assert all(torch.equal(frozen, own) and frozen is not own for frozen, own in pairs)


# --- validation ------------------------------------------------------------------------------------------------------


def test_validation_averages_over_images(monkeypatch):
    module = TeacherModule(model(), TeacherConfig(), OptimConfig(), PROTOCOL)
    logged = Logged(module, monkeypatch)
    from depthkit.evaluation.protocols import score

    values = []
    for seed in range(3):
        part = batch(1, seed)
        part["target"] = 1 + 5 * part["target"]
        module.validation_step(part, seed)
        with torch.no_grad():
            values.append(score(module(part["image"]).values, part["target"], part["valid_mask"], PROTOCOL)["abs_rel"])
    module.validation_step(Rejection(dataset="it", shard="s", key="k", reason="broken"), 3)
    module.on_validation_epoch_end()
    assert set(logged) == {val_name(PROTOCOL, name) for name in PROTOCOL.metrics}
    torch.testing.assert_close(logged[val_name(PROTOCOL, "abs_rel")].compute(), torch.cat(values).mean())


# --- pre-training ----------------------------------------------------------------------------------------------------


class OneRank:
    """What `hidden_patches` reads of a Trainer."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.global_rank, self.world_size = rank, world_size


def pretrain(seed: int = 0) -> PretrainModule:
    torch.manual_seed(0)
    return PretrainModule(build_encoder(MODEL), PretrainConfig(mask_ratio=0.5), OptimConfig(), seed=seed)


def hidden(module: PretrainModule, monkeypatch: pytest.MonkeyPatch, step: int, rank: int = 0, world: int = 1) -> Tensor:
    monkeypatch.setattr(PretrainModule, "trainer", OneRank(rank, world), raising=False)
    return module.hidden_patches(4 // world, (4, 4), step)


def test_hidden_patches_are_a_function_of_seed_and_step(monkeypatch):
    module = pretrain()
    first = hidden(module, monkeypatch, step=3)
    assert first.shape == (4, 4, 4)
    assert first.flatten(1).sum(1).tolist() == [8, 8, 8, 8]
    assert torch.equal(first, hidden(module, monkeypatch, step=3))
    assert not torch.equal(first, hidden(module, monkeypatch, step=4))
    assert not torch.equal(first, hidden(pretrain(seed=1), monkeypatch, step=3))
    ranks = [hidden(module, monkeypatch, step=3, rank=rank, world=2) for rank in range(2)]
    assert torch.equal(torch.cat(ranks), first)


def test_pretraining_sees_no_hidden_pixel(monkeypatch):
    """A hidden pixel enters the loss through the target alone, as abs(prediction - pixel) / (3 M)."""
    module = pretrain().eval()
    part = batch(4)
    part["image"].requires_grad_()
    pixels = hidden(module, monkeypatch, step=0).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    module.training_step({"unlabeled": part}, 0).backward()
    gradient = part["image"].grad.masked_select(pixels)
    torch.testing.assert_close(gradient.abs(), torch.full_like(gradient, 1 / (3 * pixels.sum())), rtol=1e-4, atol=0)
    assert part["image"].grad.masked_select(~pixels).any()


def test_pretraining_trains_the_mask_token_and_the_whole_encoder(monkeypatch):
    module = pretrain()
    monkeypatch.setattr(PretrainModule, "trainer", OneRank(), raising=False)
    module.training_step({"unlabeled": batch(4)}, 0).backward()
    assert all(parameter.grad is not None and parameter.requires_grad for parameter in module.parameters())
