"""The stage that learns from video: its losses against their definition, its validation, and what it hands over."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from depthkit import losses_video
from depthkit.bundle import BundleError
from depthkit.config import ConfigError, DispNetConfig, EgomotionConfig, OptimConfig, VideoConfig
from depthkit.data.procedural import render_clip
from depthkit.data.windows import normalize
from depthkit.egomotion_bundle import load_egomotion, save_egomotion
from depthkit.evaluation.settings import Alignment, ProtocolConfig
from depthkit.icp import icp_loss
from depthkit.models import build_model
from depthkit.models.activations import RisingReLU
from depthkit.models.egomotion import EgomotionNet
from depthkit.reporting import batch_flops
from depthkit.stages.video import Pairs, VideoModule, disparity_pyramid, spread, trajectory, unnormalized
from depthkit.types import ModelOutput
from depthkit.warping import back_project, pose_matrix, pose_vector, scaled_intrinsics, warp

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")
PROTOCOL = ProtocolConfig(name="p", max_depth=80.0, alignment=Alignment.scale_median)
EGOMOTION = EgomotionConfig(widths=[4, 8, 8])


def module(**settings: Any) -> VideoModule:
    torch.manual_seed(0)
    model, egomotion = build_model(DispNetConfig(width_factor=0.05)), EgomotionNet(EGOMOTION, 3)
    stage = VideoConfig(egomotion=EGOMOTION, **{"icp_points": 64, **settings})
    return VideoModule(model, egomotion, "depth", stage, OptimConfig(), PROTOCOL)


def clip_batch(count: int = 2, size: tuple[int, int] = (32, 48), num_frames: int = 3) -> dict[str, torch.Tensor]:
    """Clips of the procedural world as the data module gives them."""
    settings = {"domain": "source", "split": "val", "seed": 0, "size": size}
    clips = [render_clip(index=i, num_frames=num_frames, frame_step=3, **settings) for i in range(count)]
    images = torch.from_numpy(np.stack([[frame.image for frame in clip] for clip in clips])).permute(0, 1, 4, 2, 3)
    poses = np.stack([[frame.camera_to_world for frame in clip] for clip in clips])
    return {
        "image": normalize(images.flatten(0, 1)).view(images.shape),
        "intrinsics_px": torch.tensor([clip[0].intrinsics_px for clip in clips]),
        "camera_to_world": torch.from_numpy(np.linalg.inv(poses[:, :1]) @ poses).float(),
    }


def parts(output: Any) -> dict[str, torch.Tensor]:
    return {name: values.double() for name, values in output["image_losses"].items()}


def test_an_encoder_with_dpt_whose_disparity_is_0_everywhere_learns_again(compose):
    """ReLU would have no gradient there; the prediction is that of ReLU all the same."""
    model = build_model(compose("model=tiny", "data=tiny_teacher").model)
    plain = copy.deepcopy(model)
    video = VideoModule(
        model, EgomotionNet(EGOMOTION, 3), "disparity", VideoConfig(egomotion=EGOMOTION, icp_weight=0.0),
        OptimConfig(), PROTOCOL,
    )  # fmt: skip
    image = clip_batch()["image"].flatten(0, 1)
    torch.testing.assert_close(model(image).values, plain(image).values, rtol=0, atol=0)
    assert model.state_dict().keys() == plain.state_dict().keys()
    bias = model.decoder.head_out[2].bias
    with torch.no_grad():
        bias.fill_(-1e3)
    assert not model(image).values.any()
    nearer = -video.model(image).values.mean()
    nearer.backward()
    torch.testing.assert_close(bias.grad, torch.tensor([-1.0]))


@pytest.mark.parametrize(
    ("value", "gradient", "expected"), [(2.0, 3.0, 3.0), (2.0, -3.0, -3.0), (-2.0, 3.0, 0.0), (-2.0, -3.0, -3.0)]
)
def test_rising_relu(value, gradient, expected):
    values = torch.tensor(value, requires_grad=True)
    found = RisingReLU()(values)
    assert found == max(value, 0)
    found.backward(torch.tensor(gradient))
    assert values.grad == expected


def test_the_losses_are_the_sums_of_vid2depth():
    """Over scales, frames and ordered pairs, one at a time, from the public functions."""
    video, batch = module(), clip_batch()
    found = parts(video.training_step({"unlabeled": batch}, 0))  # type: ignore[dict-item]
    video.zero_grad()
    images, motions = unnormalized(batch["image"]), video.egomotion(batch["image"])
    pyramid = video.model(batch["image"].flatten(0, 1)).disparities
    expected = dict.fromkeys(found, torch.zeros(2, dtype=torch.float64))
    for scale, disparities in enumerate(pyramid):
        disparities = disparities.view(2, 3, *disparities.shape[1:])
        intrinsics = scaled_intrinsics(batch["intrinsics_px"], 0.5**scale)
        frames = [torch.nn.functional.avg_pool2d(images[:, t], 2**scale) for t in range(3)]
        for t in range(3):
            smoothness = losses_video.smoothness_loss(disparities[:, t], frames[t]) / 2**scale
            expected["smoothness"] = expected["smoothness"] + smoothness.double()
        for target, source, motion in ((0, 1, motions[:, 0]), (1, 2, motions[:, 1]), (1, 0, -motions[:, 0]),
                                       (2, 1, -motions[:, 1])):  # fmt: skip
            depth = 1 / disparities[:, target]
            warped, valid = warp(frames[source], depth, pose_matrix(motion), intrinsics)
            loss = 0.85 * losses_video.reconstruction_loss(warped, frames[target], valid)
            loss = loss + 0.15 * losses_video.ssim_loss(warped, frames[target], valid)
            expected["photometric"] = expected["photometric"] + loss.double()
            numbers = spread(depth[0].numel(), 64, depth.device)
            clouds = [
                back_project(d, intrinsics).flatten(2)[..., numbers].mT for d in (depth, 1 / disparities[:, source])
            ]
            expected["icp"] = expected["icp"] + icp_loss(clouds[0], motion, clouds[1]).double() / 2**scale
    for name in ("photometric", "smoothness", "icp"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_minimum_reprojection_takes_the_better_neighbour():
    """The middle frame has two, the others one."""
    video, batch = module(minimum_reprojection=True, auto_mask=True, num_scales=1, icp_weight=0.0), clip_batch()
    found = parts(video.training_step({"unlabeled": batch}, 0))["photometric"]  # type: ignore[dict-item]
    images, motions = unnormalized(batch["image"]), video.egomotion(batch["image"])
    depth = 1 / video.model(batch["image"].flatten(0, 1)).disparities[0].view(2, 3, 32, 48)
    neighbours = {0: {1: motions[:, 0]}, 1: {2: motions[:, 1], 0: -motions[:, 0]}, 2: {1: -motions[:, 1]}}
    expected = torch.zeros(2)
    for target, sources in neighbours.items():
        errors, masks, static = [], [], []
        for source, motion in sources.items():
            warped, valid = warp(images[:, source], depth[:, target], pose_matrix(motion), batch["intrinsics_px"])
            weights = {"reconstruction_weight": 0.85, "ssim_weight": 0.15}
            errors.append(losses_video.photometric_error(warped, images[:, target], **weights))
            static.append(losses_video.photometric_error(images[:, source], images[:, target], **weights))
            masks.append(valid)
        expected = expected + losses_video.minimum_reprojection_loss(*map(torch.stack, (errors, masks, static)))
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-6)


def test_normalised_disparity_does_not_see_the_unit():
    video, batch = module(normalize_disparity=True, icp_weight=0.0), clip_batch()
    pyramid = video.model(batch["image"].flatten(0, 1)).disparities
    found = []
    for factor in (1.0, 3.0):
        scaled = ModelOutput(values=pyramid[0], features=pyramid[0], disparities=[factor * d.detach() for d in pyramid])
        video.model.forward = lambda image, scaled=scaled: scaled  # type: ignore[method-assign,assignment,misc]
        found.append(parts(video.training_step({"unlabeled": batch}, 0)))  # type: ignore[dict-item]
    for name in ("photometric", "smoothness"):
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{}, {"minimum_reprojection": True, "auto_mask": True, "normalize_disparity": True}]
)
def test_both_networks_learn_from_a_step(settings):
    video = module(**settings)
    video.training_step({"unlabeled": clip_batch()}, 0)["loss"].backward()  # type: ignore[dict-item]
    for network in (video.model, video.egomotion):
        gradients = [parameter.grad for parameter in network.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        assert sum(float(gradient.abs().sum()) for gradient in gradients if gradient is not None) > 0


@pytest.mark.parametrize(
    "settings", [{}, {"minimum_reprojection": True, "auto_mask": True, "normalize_disparity": True}]
)
def test_a_step_brings_nothing_to_the_device(settings):
    """Each list of numbers that becomes a tensor there, and each value that is read, would wait for it."""
    video, batch, found = module(icp_weight=0.0, **settings), clip_batch(), []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(func, "__name__", "")
            index = args[1] if name == "__getitem__" else ()
            has_list = any(isinstance(part, list) for part in (index if isinstance(index, tuple) else (index,)))
            if has_list or name in ("tensor", "new_tensor", "as_tensor", "item", "tolist", "cpu", "__bool__"):
                found.append(name)
            return func(*args, **(kwargs or {}))

    with Watch():
        video.training_step({"unlabeled": batch}, 0)  # type: ignore[dict-item]
    assert found == []


def test_networks_are_compiled_and_exact(monkeypatch):
    """The depth network is called as a whole, which is what `trainer.compile` compiles; under autocast what it and the
    ego-motion network say is not rounded to 8 bits."""
    video, batch, seen = module(icp_weight=0.0), clip_batch(), []
    monkeypatch.setattr(video.model, "_compiled_call_impl", lambda image: seen.append(1) or video.model.forward(image))
    video.training_step({"unlabeled": batch}, 0)  # type: ignore[dict-item]
    assert seen == [1]
    with torch.autocast("cpu", torch.bfloat16):
        disparities = video.model(batch["image"][:, 0]).disparities
        assert {values.dtype for values in (*disparities, video.egomotion(batch["image"]))} == {torch.float32}


def test_any_model_of_disparity_has_a_pyramid(compose):
    from conftest import TINY_MODEL

    model = build_model(compose("stage=pretrain", "data=tiny_pretrain", *TINY_MODEL).model)
    pyramid = disparity_pyramid(model, torch.rand(2, 3, 32, 40), "disparity", 3)
    assert [tuple(d.shape) for d in pyramid] == [(2, 32, 40), (2, 16, 20), (2, 8, 10)]
    assert all((d.detach() >= 0.0099).all() for d in pyramid)
    torch.testing.assert_close(pyramid[1].mean(), pyramid[0].mean())


def test_every_frame_of_a_clip_is_counted_as_work(compose):
    config = compose("experiment=tiny_vid2depth")
    clips = batch_flops(config, module())
    config.data.clip_frames = None
    assert clips == 3 * batch_flops(config, module())


def test_pairs_are_all_ordered_neighbours():
    motions = torch.rand(2, 3, 6)
    pairs = Pairs(motions)
    found = sorted(zip(pairs.target, pairs.source, strict=True))
    assert found == [(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)]
    vectors = pairs.by_clip(pairs.vectors)
    for number, (target, source) in enumerate(zip(pairs.target, pairs.source, strict=True)):
        sign = 1 if source > target else -1
        torch.testing.assert_close(vectors[:, number], sign * motions[:, min(target, source)])


def test_the_trajectory_of_the_true_motions_is_the_true_one():
    poses = clip_batch(num_frames=4)["camera_to_world"]
    motions = pose_vector(torch.linalg.inv(poses[:, 1:]) @ poses[:, :-1])
    torch.testing.assert_close(trajectory(motions), poses, atol=1e-4, rtol=0)


def test_windows_share_their_motions():
    video = module().eval()
    clip = clip_batch(num_frames=5)["image"]
    with torch.no_grad():
        found = video.window_motions(clip)
        windows = [video.egomotion(clip[:, first : first + 3]) for first in range(3)]
    torch.testing.assert_close(found[:, 0], windows[0][:, 0])
    torch.testing.assert_close(found[:, 1], (windows[0][:, 1] + windows[1][:, 0]) / 2)
    torch.testing.assert_close(found[:, 3], windows[2][:, 1])


def test_validation_of_clips_measures_both_paths():
    """A perfect network has ATE 0; the baseline's is that of a camera going straight ahead."""
    video, batch = module().eval(), clip_batch()
    poses = batch["camera_to_world"]
    true = pose_vector(torch.linalg.inv(poses[:, 1:]) @ poses[:, :-1])
    video.window_motions = lambda clip: true  # type: ignore[method-assign]
    video.validation_step(batch, 0)  # type: ignore[arg-type]
    assert video.video_metrics["ate/egomotion"].compute() < 1e-4
    path = poses[..., :3, 3].double()
    straight = torch.zeros(3, 3, dtype=torch.float64)
    straight[:, 2] = torch.arange(3)
    scale = (path * straight).sum((1, 2)) / straight.square().sum()
    error = ((scale[:, None, None] * straight - path) ** 2).sum((1, 2)).sqrt() / 3
    torch.testing.assert_close(
        video.video_metrics["ate/constant_motion"].compute().double(), error.mean(), atol=1e-5, rtol=0
    )


def test_spread_takes_some_or_all():
    device = torch.device("cpu")
    assert spread(10, None, device).tolist() == list(range(10))
    assert spread(10, 20, device).tolist() == list(range(10))
    assert spread(10, 4, device).tolist() == [0, 2, 5, 7]


def test_the_egomotion_network_comes_back(tmp_path: Path):
    network = EgomotionNet(EgomotionConfig(widths=[4, 8], search_px=2), 3).eval()
    folder = save_egomotion(tmp_path / "egomotion", network, EgomotionConfig(widths=[4, 8], search_px=2))
    clip = torch.rand(1, 3, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(load_egomotion(folder)(clip), network(clip), rtol=0, atol=0)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match="sha256"):
        load_egomotion(folder)


def test_other_folders_are_not_taken_for_it(tmp_path: Path, tiny_teacher: Path):
    with pytest.raises(BundleError, match="no ego-motion network"):
        load_egomotion(tiny_teacher)
    with pytest.raises(BundleError, match="missing"):
        load_egomotion(tmp_path)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"icp_weight": -0.1}, "icp_weight"),
        ({"reconstruction_weight": 0.0, "ssim_weight": 0.0}, "ssim_weight"),
        ({"num_scales": 5}, "num_scales"),
        ({"icp_points": 2}, "icp_points"),
        ({"auto_mask": True}, "auto_mask"),
        ({"decoder_weights": True}, "decoder_weights"),
    ],
)
def test_settings_are_checked(settings, field):
    with pytest.raises(ConfigError, match=field):
        VideoConfig(**settings)
