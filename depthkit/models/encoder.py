"""Encoders from timm: one image in, four tapped feature maps and the final features out.

Shapes: B images, H/W pixels, h/w patches, D embedding width, P patch size (H = h * P).
"""

from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DINOV2_OFFSET = 0.1
"""Added to the patch grid before the position embedding is interpolated, as in DINOv2's `interpolate_pos_encoding`."""


class Encoder(nn.Module):
    """What the decoder knows of an encoder.

    `tap_layers` are the blocks (of a hierarchical encoder: the stages) whose outputs the decoder reads, 0-based;
    `widths` and `strides` (pixels) are those of the taps. Images need sides that are multiples of `multiple`, the
    stride of the final features: the patch size of a vision transformer.
    """

    def __init__(self, *, tap_layers: list[int], widths: list[int], strides: list[int], multiple: int) -> None:
        super().__init__()
        self.tap_layers = list(tap_layers)
        self.widths = widths
        self.strides = strides
        self.multiple = multiple

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """`image` (B, 3, H, W) to four taps (B, D_i, H / s_i, W / s_i), shallow first, and the final features."""
        raise NotImplementedError

    def checkpoint_activations(self) -> None:
        """Keep the inputs of blocks alone, and run a block again in the backward pass: less memory, same gradients."""
        (net,) = self.children()
        net.set_grad_checkpointing()  # type: ignore[operator]

    def grid(self, image: Tensor) -> tuple[int, int]:
        """(h, w) of the final features; ValueError unless the sides of `image` are multiples of `multiple`."""
        height, width = image.shape[-2:]
        if height % self.multiple or width % self.multiple:
            raise ValueError(f"image size {(height, width)} is not a multiple of {self.multiple}, as the encoder needs")
        return height // self.multiple, width // self.multiple


class PlainEncoder(Encoder):
    """A vision transformer with a class token and a learned position for each token, as DINOv2, MAE and CLIP have it.

    Every tapped output and the final features pass the transformer's last LayerNorm; prefix tokens are dropped. At
    other sizes than its own, positions are interpolated as in DINOv2.
    """

    def __init__(self, vit: VisionTransformer, tap_layers: list[int]) -> None:
        patch_size: int = vit.patch_embed.patch_size[0]
        super().__init__(
            tap_layers=tap_layers,
            widths=[vit.embed_dim] * len(tap_layers),
            strides=[patch_size] * len(tap_layers),
            multiple=patch_size,
        )
        self.vit = vit
        self.width: int = vit.embed_dim
        # DINOv2 checkpoints hold a mask token that only masked pre-training reads; timm leaves it out.
        self.mask_token = nn.Parameter(torch.zeros(1, self.width), requires_grad=False)

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        grid = self.grid(image)
        return self.encode(self.embed(image), grid)

    def embed(self, image: Tensor) -> Tensor:
        """Patch embeddings (B, h, w, D), without position."""
        return self.vit.patch_embed(image)

    def encode(self, patches: Tensor, grid: tuple[int, int]) -> tuple[list[Tensor], Tensor]:
        """Run the transformer on patch embeddings (B, h, w, D)."""
        prefix = [token for token in (self.vit.cls_token, self.vit.reg_token) if token is not None]
        position = interpolate_position_embedding(self.vit.pos_embed, grid, self.vit.num_prefix_tokens)
        batch = patches.shape[0]  # not len(): that is a plain number, which an exported graph would keep
        tokens = torch.cat([token.expand(batch, -1, -1) for token in prefix] + [patches.flatten(1, 2)], dim=1)
        tokens = self.vit.norm_pre(tokens + position)
        taps: list[Tensor] = []
        for index, block in enumerate(self.vit.blocks):
            tokens = self.run(block, tokens)
            if index in self.tap_layers:
                taps.append(self.to_map(tokens, grid))
        features = taps[-1] if self.tap_layers[-1] == len(self.vit.blocks) - 1 else self.to_map(tokens, grid)
        return taps, features

    def run(self, block: nn.Module, tokens: Tensor) -> Tensor:
        return checkpoint(block, tokens, use_reentrant=False) if self.vit.grad_checkpointing else block(tokens)

    def to_map(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Block output (B, prefix + h w, D) to a normalised map (B, D, h, w)."""
        patches = self.vit.norm(tokens)[:, self.vit.num_prefix_tokens :]
        return patches.transpose(1, 2).reshape(patches.shape[0], self.width, *grid)


class IntermediatesEncoder(Encoder):
    """Any timm network with `forward_intermediates`: transformers with registers, rotary or no class token (DINOv3,
    SigLIP2, EVA-02, ...), and hierarchical ones (ResNet, ConvNeXt, Swin, ...), whose stages are tapped.

    Widths and strides come from timm. Taps of a transformer pass its last norm. What lies behind the last tap or the
    last block is removed.
    """

    def __init__(self, net: Any, tap_layers: list[int]) -> None:
        is_normalised = is_columnar(net)
        stages: list[dict[str, Any]] = net.feature_info
        # SAM's last norm also changes the width.
        key = "num_chs_norm" if is_normalised else "num_chs"
        widths = [stage.get(key, stage["num_chs"]) for stage in stages]
        super().__init__(
            tap_layers=tap_layers,
            widths=[widths[index] for index in tap_layers],
            strides=[stages[index]["reduction"] for index in tap_layers],
            multiple=max(stage["reduction"] for stage in stages),
        )
        self.indices = sorted({*tap_layers, len(stages) - 1})
        self.norm = is_normalised
        net.prune_intermediate_layers(self.indices, prune_norm=not self.norm)
        self.net = net

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        self.grid(image)
        maps = self.net.forward_intermediates(image, indices=self.indices, norm=self.norm, intermediates_only=True)
        return maps[: len(self.tap_layers)], maps[-1]


def create_encoder(
    name: str, *, tap_layers: list[int], conv_stem: bool = False, pretrained: bool = False, **encoder_args: Any
) -> Encoder:
    """The encoder of a timm name, with random weights or, `pretrained`, with timm's (downloaded from its hub).

    `conv_stem` replaces the linear patch embedding by stride-2 convolutions: small models learn far faster with it.
    ValueError names the encoder, the argument or the tap that does not exist.
    """
    if not timm.is_model(name):
        raise ValueError(f"model.encoder={name}: timm {timm.__version__} has no such model")
    stem = {"embed_layer": ConvStem} if conv_stem else {}
    net = create_network(name, num_classes=0, pretrained=pretrained, **stem, **encoder_args)
    if not hasattr(net, "forward_intermediates"):
        raise ValueError(f"model.encoder={name}: timm's {type(net).__name__} does not give intermediate features")
    num_layers = len(net.feature_info)
    if min(tap_layers) < 0 or max(tap_layers) >= num_layers:
        layers = "blocks" if is_columnar(net) else "stages"
        raise ValueError(f"model.tap_layers={tap_layers}: {name} has {layers} 0 to {num_layers - 1}")
    return PlainEncoder(net, tap_layers) if is_plain(net) else IntermediatesEncoder(net, tap_layers)


def create_network(name: str, **arguments: Any) -> Any:
    """timm's network; asked for any image size where its kind does not take that by itself."""
    try:
        return timm.create_model(name, dynamic_img_size=True, **arguments)
    except TypeError as refused:
        if "dynamic_img_size" not in str(refused):
            raise ValueError(f"model.encoder={name}: does not take these model.encoder_args; {refused}") from refused
    try:
        return timm.create_model(name, **arguments)
    except TypeError as refused:
        raise ValueError(f"model.encoder={name}: does not take these model.encoder_args; {refused}") from refused


def is_columnar(net: Any) -> bool:
    """Whether all blocks have one resolution, as in a plain transformer."""
    return len({stage["reduction"] for stage in net.feature_info}) == 1


def is_plain(net: nn.Module) -> bool:
    """Whether `PlainEncoder` can run it: class token, learned positions for prefix and patches, one last norm."""
    return (
        isinstance(net, VisionTransformer)
        and net.pos_embed is not None
        and net.cls_token is not None
        and net.pos_embed.shape[1] == net.num_prefix_tokens + net.patch_embed.num_patches
        and not isinstance(net.norm, nn.Identity)
    )


def interpolate_position_embedding(embedding: Tensor, grid: tuple[int, int], num_prefix: int) -> Tensor:
    """Position embedding (1, prefix + g g, D) resampled from its square g x g grid to `grid`, as DINOv2 does it.

    Bicubic with scale factor (h + 0.1) / g, not h / g: the released weights expect it at every size but their own
    (dinov2 `interpolate_pos_encoding`, offset 0.1, no antialiasing).
    """
    side = round((embedding.shape[1] - num_prefix) ** 0.5)
    offset: Tensor | float = DINOV2_OFFSET
    if torch.compiler.is_exporting():
        # An exported graph serves every size, its own among them: there the weights below become 0 and 1.
        is_native = torch.tensor(grid, device=embedding.device).eq(side).all()
        offset = torch.where(is_native, 0.0, DINOV2_OFFSET)
    elif grid == (side, side):
        return embedding
    prefix, patches = embedding[:, :num_prefix], embedding[:, num_prefix:]
    columns = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    rows, cols = (bicubic_weights(length, side, offset, embedding.device) for length in grid)
    resampled = rows @ columns @ cols.T
    return torch.cat([prefix, resampled.flatten(2).transpose(1, 2).to(prefix.dtype)], dim=1)


def bicubic_weights(length: int, native: int, offset: Tensor | float, device: torch.device) -> Tensor:
    """(length, native): what each of `length` samples takes of `native` values, those at the ends going on beyond them.

    Sample i lies at (i + 0.5) * native / (length + offset) - 0.5; cubic convolution with a = -0.75, as PyTorch's
    bicubic `interpolate` with that scale factor, but as a matrix: it can be exported for any `length`.
    """
    centres = (torch.arange(length, device=device) + 0.5) * (native / (length + offset)) - 0.5
    places = torch.arange(-2, native + 2, device=device)
    distance = (centres[:, None] - places).abs()
    near = (1.25 * distance - 2.25) * distance.square() + 1
    far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
    weights = torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))
    # Not a replicating pad of the values: its backward pass fails under torch.compile (2.15, layout of the gradient).
    is_source = places.clamp(0, native - 1)[:, None] == torch.arange(native, device=device)
    return weights @ is_source.to(weights.dtype)


class ConvStem(nn.Module):
    """Patch embedding by stride-2 3x3 convolutions, one per factor of two in the patch size (Xiao et al. 2021).

    Takes the arguments that timm gives to a patch embedding; returns (B, h, w, D).
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: Any) -> None:
        super().__init__()
        num_layers = patch_size.bit_length() - 1
        if 2**num_layers != patch_size:
            raise ValueError(f"a convolutional stem needs a patch size that is a power of two, got {patch_size}")
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        widths = [in_chans] + [embed_dim >> (num_layers - 1 - i) for i in range(num_layers)]
        layers: list[nn.Module] = []
        for i in range(num_layers):
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1),
                nn.GroupNorm(1, widths[i + 1]),
                nn.GELU(),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image).permute(0, 2, 3, 1)
