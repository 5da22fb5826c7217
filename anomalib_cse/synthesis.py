"""Synthetic defects: structural, textural and blur, inside Perlin noise masks (Section 3.1).

All that is random is drawn first, by :meth:`AnomalySynthesis.sample`; :meth:`AnomalySynthesis.apply` only computes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from .checks import check_number, check_range, is_within
from .colour import hsv_to_rgb, rgb_to_hsv
from .perlin import perlin_masks, rotate

OPERATIONS_DRAWN = 3  # of those listed for structural and for textural defects


@dataclass
class SynthesisParams:
    """What was drawn for B images; each field has B rows.

    Attributes:
        mask: Where the image is replaced, ``(B, 1, H, W)`` bool.
        kind: Index into :data:`KINDS`, ``(B,)``.
        operations: Which operations of its kind apply, ``(B, 9)`` bool, in their listed order.
        texture: Row of the texture bank, ``(B,)``.
        flip: Left-right and up-down, ``(B, 2)`` bool.
        angle: Rotation of the structural source in degrees, ``(B,)``.
        cells: Order of the grid cells of the structural source, ``(B, grid * grid)``.
        brightness: Factor, ``(B,)``.
        offset: Added to the brightness of a texture, ``(B,)``.
        hue: Factor for the structural source, ``(B,)``.
        saturation: Factor for the structural source, ``(B,)``.
        shift: Added to hue and saturation of a texture, ``(B, 2)``.
        gamma: Exponent per channel of a texture, ``(B, 3)``.
        sharpness: Factor for a texture; 0 blurs, 1 leaves as is, ``(B,)``.
        solarise: Value above which a texture is inverted, ``(B,)``.
        levels: Values per channel that posterising leaves a texture, ``(B,)``.
        kernel_size: Odd width of the Gaussian blur in pixels, ``(B,)``.
    """

    mask: Tensor
    kind: Tensor
    operations: Tensor
    texture: Tensor
    flip: Tensor
    angle: Tensor
    cells: Tensor
    brightness: Tensor
    offset: Tensor
    hue: Tensor
    saturation: Tensor
    shift: Tensor
    gamma: Tensor
    sharpness: Tensor
    solarise: Tensor
    levels: Tensor
    kernel_size: Tensor

    def to(self, device: torch.device) -> "SynthesisParams":
        """The same parameters on ``device``."""
        there = device.type != "cpu"  # where what is copied is read in order
        return SynthesisParams(*(getattr(self, f.name).to(device, non_blocking=there) for f in fields(self)))

    def __getitem__(self, rows: Any) -> "SynthesisParams":
        """The parameters of some of the images."""
        return SynthesisParams(*(getattr(self, f.name)[rows] for f in fields(self)))


Operation = Callable[[Tensor, SynthesisParams], Tensor]

KINDS = ("structural", "textural", "blur")
MAX_KERNEL_SIZE = 31


def per_image(values: Tensor) -> Tensor:
    """View ``(B,)`` or ``(B, C)`` so that it broadcasts over ``(B, C, H, W)``."""
    return values.reshape(len(values), -1, 1, 1)


def flip(images: Tensor, params: SynthesisParams) -> Tensor:
    """Mirror left-right and up-down, as drawn."""
    images = torch.where(per_image(params.flip[:, 0]), images.flip(-1), images)
    return torch.where(per_image(params.flip[:, 1]), images.flip(-2), images)


def sharpen(images: Tensor, params: SynthesisParams) -> Tensor:
    """Extrapolate from torchvision's smoothed image, as its ``adjust_sharpness`` does, by a factor per image."""
    smooth = TF.adjust_sharpness(images, 0.0)
    return (smooth + per_image(params.sharpness) * (images - smooth)).clamp(0, 1)


def scale_colour(images: Tensor, hue: Tensor, saturation: Tensor) -> Tensor:
    """Multiply hue and saturation by factors per image, ``(B,)`` each."""
    h, s, v = rgb_to_hsv(images).unbind(1)
    scaled = torch.stack([h * hue[:, None, None], (s * saturation[:, None, None]).clamp(max=1), v], dim=1)
    return hsv_to_rgb(scaled)


def shift_colour(images: Tensor, params: SynthesisParams) -> Tensor:
    """Add the drawn shifts to hue, which wraps around, and saturation, which is clipped."""
    h, s, v = rgb_to_hsv(images).unbind(1)
    shifts = params.shift[:, :, None, None]
    return hsv_to_rgb(torch.stack([h + shifts[:, 0], (s + shifts[:, 1]).clamp(0, 1), v], dim=1))


def equalise(images: Tensor, params: SynthesisParams) -> Tensor:
    """Flatten the histogram of every channel, at 8 bits."""
    del params
    return TF.to_dtype(TF.equalize(TF.to_dtype(images, torch.uint8, scale=True)), images.dtype, scale=True)


def shuffle_cells(images: Tensor, order: Tensor) -> Tensor:
    """Cut images into a square grid and put the cells into another order.

    Args:
        images: ``(B, C, H, W)``; sides that the grid does not divide are padded for the cut.
        order: For every cell the one that is put there, row by row, ``(B, grid * grid)``.

    Returns:
        ``(B, C, H, W)``.
    """
    b, c, height, width = images.shape
    grid = round(order.shape[1] ** 0.5)
    h, w = -(-height // grid), -(-width // grid)
    padded = F.pad(images, (0, grid * w - width, 0, grid * h - height), mode="replicate")
    cells = padded.view(b, c, grid, h, grid, w).permute(0, 2, 4, 1, 3, 5).reshape(b, grid * grid, -1)
    cells = cells.gather(1, order[:, :, None].expand_as(cells)).view(b, grid, grid, c, h, w)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(b, c, grid * h, grid * w)[:, :, :height, :width]


def gaussian_blur(images: Tensor, kernel_size: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with a kernel width per image.

    Args:
        images: ``(B, C, H, W)``.
        kernel_size: Odd widths in pixels, ``(B,)``.
        sigma: Standard deviation in pixels.

    Returns:
        ``(B, C, H, W)``.
    """
    b, c, height, width = images.shape
    radius = MAX_KERNEL_SIZE // 2
    distance = torch.arange(-radius, radius + 1, device=images.device)
    weights = torch.exp(-0.5 * (distance / sigma) ** 2) * (distance.abs() <= kernel_size[:, None] // 2)
    weights = (weights / weights.sum(1, keepdim=True)).to(images.dtype).repeat_interleave(c, 0)[:, None]  # (B C, 1, 31)
    padded = F.pad(images, (radius,) * 4, mode="replicate").reshape(1, b * c, height + 2 * radius, width + 2 * radius)
    rows = F.conv2d(padded, weights[:, :, None, :], groups=b * c)
    return F.conv2d(rows, weights[:, :, :, None], groups=b * c).view_as(images)


STRUCTURAL_OPERATIONS: dict[str, Operation] = {
    "flip": flip,
    "rotate": lambda images, p: rotate(images, p.angle, padding="reflection"),
    "brightness": lambda images, p: (images * per_image(p.brightness)).clamp(0, 1),
    "saturation": lambda images, p: scale_colour(images, torch.ones_like(p.hue), p.saturation),
    "hue": lambda images, p: scale_colour(images, p.hue, torch.ones_like(p.hue)),
}

TEXTURAL_OPERATIONS: dict[str, Operation] = {
    "gamma": lambda images, p: images ** per_image(p.gamma),
    "brightness": lambda images, p: (images * per_image(p.brightness) + per_image(p.offset)).clamp(0, 1),
    "sharpen": sharpen,
    "hue_and_saturation": shift_colour,
    "solarise": lambda images, p: torch.where(images >= per_image(p.solarise), 1 - images, images),
    "posterise": lambda images, p: (
        (images * per_image(p.levels)).floor().clamp(max=per_image(p.levels) - 1) / per_image(p.levels)
    ),
    "invert": lambda images, _: 1 - images,
    "autocontrast": lambda images, _: TF.autocontrast(images),
    "equalise": equalise,
}


def operate(images: Tensor, drawn: Tensor, params: SynthesisParams, operations: Mapping[str, Operation]) -> Tensor:
    """Apply to every image the operations drawn for it, in their listed order.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        drawn: ``(B, 9)`` bool, kept on the CPU so that choosing rows does not wait for a device.
        params: The parameters on the images' device.
        operations: What the columns of ``drawn`` stand for.

    Returns:
        ``(B, 3, H, W)``.
    """
    images = images.clone()
    for column, operation in enumerate(operations.values()):
        rows = drawn[:, column].nonzero().flatten().to(images.device, non_blocking=True)
        if len(rows):
            images[rows] = operation(images[rows], params[rows])
    return images


def structural(images: Tensor, drawn: Tensor, params: SynthesisParams) -> Tensor:
    """The images themselves, changed and cut into shuffled cells (after MemSeg)."""
    return shuffle_cells(operate(images, drawn, params, STRUCTURAL_OPERATIONS), params.cells)


def textural(textures: Tensor, drawn: Tensor, params: SynthesisParams, size: torch.Size) -> Tensor:
    """Photographs of foreign textures, changed (after DRAEM), at the images' ``size``."""
    chosen = TF.to_dtype(textures[params.texture], torch.float32, scale=True)
    if chosen.shape[-2:] != size:
        chosen = F.interpolate(chosen, size=size, mode="bilinear")
    return operate(chosen, drawn, params, TEXTURAL_OPERATIONS)


class AnomalySynthesis(v2.Transform):
    """Paint synthetic defects into images, a whole batch at a time; a torchvision v2 transform.

    Called with images ``(B, 3, H, W)`` or ``(3, H, W)`` in [0, 1] it returns the corrupted images and their masks;
    a :class:`torchvision.tv_tensors.Mask` passed along gets the defects added.

    Args:
        textures: Photographs that textural defects are taken from, ``(T, 3, h, w)`` uint8; see
            :mod:`anomalib_cse.textures`.
        probability: Of an image being corrupted, in [0, 1].
        kinds: Out of :data:`KINDS`, all equally likely, or a mapping to their relative weights.
        generator: Source of all randomness; ``None`` is torch's global one.
        max_exponent: The masks' lattice has up to 2^max_exponent cells a side, in 0..5.
        mask_threshold: The mask is where the noise exceeds it, in [0, 0.7].
        mask_angle: Masks are rotated by up to this many degrees, in [0, 180].
        angle: Structural sources are rotated by up to this many degrees, in [0, 180].
        grid: Structural sources are cut into grid x grid cells, at least 1.
        brightness: Range of the factor for structural and textural sources.
        offset: Largest brightness added to or taken from a texture, in [0, 1].
        hue: Range of the factor for structural sources.
        saturation: Range of the factor for structural sources.
        shift: Largest change of a texture's hue and saturation, in [0, 1].
        gamma: Range of the exponents for textures.
        sharpness: Range of the sharpening factor for textures.
        solarise: Range of the value above which textures are inverted.
        bits: Range of the bits a channel that posterising keeps, in 1..8.
        kernel_size: Range of the odd width of the blur in pixels, in 1..31.
        sigma: Standard deviation of the blur in pixels, in [0.01, 1000].

    Raises:
        ValueError: If an argument is outside its range.
    """

    _transformed_types = (torch.Tensor,)
    textures: Tensor

    def __init__(
        self,
        textures: Tensor,
        *,
        probability: float = 1.0,
        kinds: Sequence[str] | Mapping[str, float] = KINDS,
        generator: Generator | None = None,
        max_exponent: int = 5,
        mask_threshold: float = 0.5,
        mask_angle: float = 90.0,
        angle: float = 45.0,
        grid: int = 8,
        brightness: tuple[float, float] = (0.8, 1.2),
        offset: float = 30 / 255,
        hue: tuple[float, float] = (0.5, 1.5),
        saturation: tuple[float, float] = (0.5, 1.5),
        shift: float = 50 / 255,
        gamma: tuple[float, float] = (0.5, 2.0),
        sharpness: tuple[float, float] = (0.0, 3.0),
        solarise: tuple[float, float] = (32 / 255, 128 / 255),
        bits: tuple[int, int] = (1, 8),
        kernel_size: tuple[int, int] = (5, 15),
        sigma: float = 6.0,
    ) -> None:
        super().__init__()
        weights = dict.fromkeys(kinds, 1.0) if isinstance(kinds, Sequence) else kinds
        allowed = isinstance(weights, Mapping) and set(weights) <= set(KINDS)
        if not allowed or not all(is_within(w, "[0, inf)") for w in weights.values()) or not any(weights.values()):
            msg = f"kinds must be some of {KINDS}, with weights of at least 0 if any, got {kinds!r}"
            raise ValueError(msg)
        shape: tuple = tuple(getattr(textures, "shape", ()))
        dtype = getattr(textures, "dtype", type(textures))
        if dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or 0 in shape:
            msg = f"textures must be (T, 3, h, w) uint8, none of them 0, got {shape} {dtype}"
            raise ValueError(msg)
        if generator is not None and not isinstance(generator, Generator):
            msg = f"generator must be a torch.Generator or None, got {generator!r}"
            raise ValueError(msg)
        check_number("probability", probability, "[0, 1]")
        check_number("max_exponent", max_exponent, "[0, 5]", whole=True)
        check_number("mask_threshold", mask_threshold, "[0, 0.7]")
        check_number("mask_angle", mask_angle, "[0, 180]")
        check_number("angle", angle, "[0, 180]")
        check_number("grid", grid, "[1, 256]", whole=True)
        check_range("brightness", brightness, "[0, 10]")
        check_number("offset", offset, "[0, 1]")
        check_range("hue", hue, "[0, 10]")
        check_range("saturation", saturation, "[0, 10]")
        check_number("shift", shift, "[0, 1]")
        check_range("gamma", gamma, "[0.01, 100]")
        check_range("sharpness", sharpness, "[0, 100]")
        check_range("solarise", solarise, "[0, 1]")
        check_range("bits", bits, "[1, 8]", whole=True)
        check_range("kernel_size", kernel_size, f"[1, {MAX_KERNEL_SIZE}]", whole=True)
        if kernel_size[0] == kernel_size[1] and kernel_size[0] % 2 == 0:
            msg = f"kernel_size must include an odd width, got {kernel_size}"
            raise ValueError(msg)
        check_number("sigma", sigma, "[0.01, 1000]")
        self.register_buffer("textures", textures, persistent=False)
        self.kind_weights = torch.tensor([float(weights.get(kind, 0.0)) for kind in KINDS])
        self.probability = probability
        self.generator = generator
        self.max_exponent = max_exponent
        self.mask_threshold = mask_threshold
        self.mask_angle = mask_angle
        self.angle = angle
        self.grid = grid
        self.brightness = brightness
        self.offset = offset
        self.hue = hue
        self.saturation = saturation
        self.shift = shift
        self.gamma = gamma
        self.sharpness = sharpness
        self.solarise = solarise
        self.bits = bits
        self.kernel_size = kernel_size
        self.sigma = sigma

    def sample(self, shape: Sequence[int], generator: Generator | None = None) -> SynthesisParams:
        """Draw the defects of a batch.

        Args:
            shape: Of the images, ``(B, 3, H, W)``.
            generator: In place of the transform's own.

        Returns:
            The parameters, on the generator's device.
        """
        generator = generator or self.generator
        device = generator.device if generator else torch.device("cpu")
        b = shape[0]

        def uniform(low: float, high: float, *columns: int) -> Tensor:
            return low + (high - low) * torch.rand(b, *columns, generator=generator, device=device)

        def integer(low: int, high: int) -> Tensor:
            return torch.randint(low, high + 1, (b,), generator=generator, device=device)

        kind = torch.multinomial(self.kind_weights.to(device), b, replacement=True, generator=generator)
        among = torch.tensor([len(STRUCTURAL_OPERATIONS), len(TEXTURAL_OPERATIONS), 1], device=device)[kind]
        ranks = uniform(0, 1, len(TEXTURAL_OPERATIONS))
        ranks = ranks.masked_fill(torch.arange(ranks.shape[1], device=device) >= among[:, None], 2.0)
        hit = uniform(0, 1) < self.probability
        masks = perlin_masks(
            b, (shape[-2], shape[-1]), generator, self.max_exponent, self.mask_angle, self.mask_threshold
        )
        return SynthesisParams(
            mask=masks & per_image(hit),
            kind=kind,
            operations=ranks.argsort(1).argsort(1) < OPERATIONS_DRAWN,
            texture=integer(0, len(self.textures) - 1),
            flip=uniform(0, 1, 2) < 0.5,
            angle=uniform(-self.angle, self.angle),
            cells=uniform(0, 1, self.grid**2).argsort(1),
            brightness=uniform(*self.brightness),
            offset=uniform(-self.offset, self.offset),
            hue=uniform(*self.hue),
            saturation=uniform(*self.saturation),
            shift=uniform(-self.shift, self.shift, 2),
            gamma=uniform(*self.gamma, 3),
            sharpness=uniform(*self.sharpness),
            solarise=uniform(*self.solarise),
            levels=2 ** integer(*self.bits),
            kernel_size=2 * integer(self.kernel_size[0] // 2, (self.kernel_size[1] - 1) // 2) + 1,
        )

    def apply(self, images: Tensor, params: SynthesisParams) -> Tensor:
        """Paint the defects that were drawn.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1].
            params: From :meth:`sample`.

        Returns:
            New images ``(B, 3, H, W)``, equal to the old ones outside ``params.mask``.
        """
        corrupted = images.clone()
        for index, kind in enumerate(KINDS):
            rows = (params.kind == index).nonzero().flatten()
            if not len(rows):
                continue
            at = rows.to(images.device)
            drawn, p, chosen = params.operations[rows].cpu(), params[rows].to(images.device), images[at].float()
            if kind == "structural":
                source = structural(chosen, drawn, p)
            elif kind == "textural":
                source = textural(self.textures, drawn, p, images.shape[-2:])
            else:
                source = gaussian_blur(chosen, p.kernel_size, self.sigma)
            corrupted[at] = torch.where(p.mask, source.to(images.dtype), images[at])
        return corrupted

    def forward(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Corrupt ``images``; returns them with the masks of the defects, of shape ``(B, 1, H, W)``.

        Raises:
            TypeError: If the images are not floating point.
        """
        if not images.is_floating_point():
            msg = f"images must be floating point in [0, 1], got {images.dtype}"
            raise TypeError(msg)
        if masks is None:
            masks = tv_tensors.Mask(torch.zeros_like(images[..., :1, :, :], dtype=torch.bool))
        return super().forward(images, masks)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw for the images among the inputs; see :meth:`sample`."""
        images = next(x for x in flat_inputs if not isinstance(x, tv_tensors.Mask))
        return {"synthesis": self.sample(images.reshape(-1, *images.shape[-3:]).shape)}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """Corrupt one input, or add the defects to it if it is a mask."""
        drawn: SynthesisParams = params["synthesis"]
        if isinstance(inpt, tv_tensors.Mask):
            defects = drawn.mask.to(inpt.device).reshape(inpt.shape)
            return tv_tensors.wrap((inpt.bool() | defects).to(inpt.dtype), like=inpt)
        corrupted = self.apply(inpt.reshape(-1, *inpt.shape[-3:]), drawn).reshape(inpt.shape)
        return tv_tensors.wrap(corrupted, like=inpt) if isinstance(inpt, tv_tensors.TVTensor) else corrupted
