"""Vision transformer encoders from timm: one image in, four tapped feature maps and the final features out.

Shapes: B images, H/W pixels, h/w patches, D embedding width, P patch size (H = h * P).
"""

from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

DINOV2_OFFSET = 0.1
"""Added to the patch grid before the position embedding is interpolated, as in DINOv2's `interpolate_pos_encoding`."""


class Encoder(nn.Module):
    """A timm vision transformer with `tap_layers`: the blocks (0-based) whose outputs the decoder reads.

    Every tapped output and the final features pass the transformer's last LayerNorm; prefix tokens are dropped.
    `conv_stem` replaces the linear patch embedding by stride-2 convolutions: small models learn far faster with it.
    ValueError names the encoder, the argument or the tap that does not exist.
    """

    def __init__(
        self,
        name: str,
        *,
        tap_layers: list[int],
        conv_stem: bool = False,
        pretrained: bool = False,
        **encoder_args: Any,
    ) -> None:
        super().__init__()
        self.vit = build_vit(
            name, pretrained=pretrained, **({"embed_layer": ConvStem} if conv_stem else {}), **encoder_args
        )
        if min(tap_layers) < 0 or max(tap_layers) >= len(self.vit.blocks):
            raise ValueError(f"model.tap_layers={tap_layers}: {name} has blocks 0 to {len(self.vit.blocks) - 1}")
        self.tap_layers = list(tap_layers)
        self.width: int = self.vit.embed_dim
        self.patch_size: int = self.vit.patch_embed.patch_size[0]
        # DINOv2 checkpoints hold a mask token that only masked pre-training reads; timm leaves it out.
        self.mask_token = nn.Parameter(torch.zeros(1, self.width), requires_grad=False)

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """`image` (B, 3, H, W) to four taps (B, D, h, w), shallow first, and the final features (B, D, h, w)."""
        h, w = self.patch_grid(image)
        return self.encode(self.embed(image), (h, w))

    def patch_grid(self, image: Tensor) -> tuple[int, int]:
        """(h, w) of `image`; ValueError unless its sides are multiples of the patch size."""
        height, width = image.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"image size {(height, width)} is not a multiple of the patch size {self.patch_size}")
        return height // self.patch_size, width // self.patch_size

    def embed(self, image: Tensor) -> Tensor:
        """Patch embeddings (B, h, w, D), without position."""
        return self.vit.patch_embed(image)

    def encode(self, patches: Tensor, grid: tuple[int, int]) -> tuple[list[Tensor], Tensor]:
        """Run the transformer on patch embeddings (B, h, w, D)."""
        num_prefix = self.vit.num_prefix_tokens
        prefix = [token for token in (self.vit.cls_token, self.vit.reg_token) if token is not None]
        position = interpolate_position_embedding(self.vit.pos_embed, grid, num_prefix)
        tokens = torch.cat([token.expand(len(patches), -1, -1) for token in prefix] + [patches.flatten(1, 2)], dim=1)
        tokens = self.vit.norm_pre(tokens + position)
        taps: list[Tensor] = []
        for index, block in enumerate(self.vit.blocks):
            tokens = block(tokens)
            if index in self.tap_layers:
                taps.append(self.to_map(tokens, grid))
        features = taps[-1] if self.tap_layers[-1] == len(self.vit.blocks) - 1 else self.to_map(tokens, grid)
        return taps, features

    def to_map(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Block output (B, prefix + h w, D) to a normalised map (B, D, h, w)."""
        patches = self.vit.norm(tokens)[:, self.vit.num_prefix_tokens :]
        return patches.transpose(1, 2).reshape(len(patches), self.width, *grid)


def build_vit(name: str, **arguments: Any) -> VisionTransformer:
    """timm's model of this name; ValueError unless it is a vision transformer that takes the arguments."""
    if not timm.is_model(name):
        raise ValueError(f"model.encoder={name}: timm {timm.__version__} has no such model")
    expected = f"model.encoder={name}: expected a timm vision transformer with learned position embeddings"
    try:
        vit = timm.create_model(name, num_classes=0, dynamic_img_size=True, **arguments)
    except TypeError as error:
        raise ValueError(f"{expected} that takes model.encoder_args; {error}") from error
    if not isinstance(vit, VisionTransformer) or vit.pos_embed is None:
        raise ValueError(expected)
    return vit


def interpolate_position_embedding(embedding: Tensor, grid: tuple[int, int], num_prefix: int) -> Tensor:
    """Position embedding (1, prefix + g g, D) resampled from its square g x g grid to `grid`, as DINOv2 does it.

    Bicubic with scale factor (h + 0.1) / g, not h / g: the released weights expect it at every size but their own
    (dinov2 `interpolate_pos_encoding`, offset 0.1, no antialiasing).
    """
    side = round((embedding.shape[1] - num_prefix) ** 0.5)
    if grid == (side, side):
        return embedding
    prefix, patches = embedding[:, :num_prefix], embedding[:, num_prefix:]
    resampled = F.interpolate(
        patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2),
        scale_factor=((grid[0] + DINOV2_OFFSET) / side, (grid[1] + DINOV2_OFFSET) / side),
        mode="bicubic",
    )
    assert resampled.shape[-2:] == grid, (resampled.shape, grid)
    return torch.cat([prefix, resampled.flatten(2).transpose(1, 2).to(prefix.dtype)], dim=1)


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
