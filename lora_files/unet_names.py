"""The layers of a U-Net (SDXL, SD 1.5) as its checkpoints call them, and as diffusers does.

Checkpoints number their blocks from end to end, diffusers by resolution and place there: with R residual blocks a
resolution,

    input_blocks.<n>    n = 1 + (R + 1) level + place; the last place of a level makes it smaller
    output_blocks.<n>   n = (R + 1) level + place
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

USUAL_RESNETS = 2
"""R of SD 1.5, SDXL and nearly all others."""

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ALONE = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.2": "conv_out",
}
TRANSFORMER = (
    r"(?:norm|proj_in|proj_out|transformer_blocks\.\d+\.(?:attn[12]\.to_(?:q|k|v|out\.0)|ff\.net\.(?:0\.proj|2)))"
)
"""What follows the name of a block's attention, alike in both."""
RESNET_BACK, ALONE_BACK = ({new: old for old, new in table.items()} for table in (RESNET, ALONE))


@dataclass(frozen=True)
class UNet:
    """What names alone do not say about the U-Net they belong to.

    `resnets` is R; `attended` are diffusers' up blocks with attention, None when the names show none at all.
    """

    resnets: int = USUAL_RESNETS
    attended: frozenset[int] | None = None

    def to_diffusers(self, path: str) -> str | None:
        """diffusers' path for a checkpoint's; None when it has none."""
        if path in ALONE:
            return ALONE[path]
        if found := re.fullmatch(r"middle_block\.([02])\.(.+)", path):
            return _joined(f"mid_block.resnets.{int(found[1]) // 2}", RESNET.get(found[2]))
        if found := re.fullmatch(rf"middle_block\.1\.({TRANSFORMER})", path):
            return f"mid_block.attentions.0.{found[1]}"
        if found := re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", path):
            return self._block_to_diffusers(found[1], int(found[2]), found[3], found[4])
        return None

    def _block_to_diffusers(self, side: str, number: int, module: str, rest: str) -> str | None:
        if side == "input" and number == 0:
            return None
        level, place = divmod(number - (side == "input"), self.resnets + 1)
        block = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
        last = place == self.resnets
        if side == "input" and last:
            return f"{block}.downsamplers.0.conv" if (module, rest) == ("0", "op") else None
        if rest == "conv" and module != "0":
            return f"{block}.upsamplers.0.conv" if last else None
        if module == "0":
            return _joined(f"{block}.resnets.{place}", RESNET.get(rest))
        return f"{block}.attentions.{place}.{rest}" if module == "1" and re.fullmatch(TRANSFORMER, rest) else None

    def from_diffusers(self, path: str) -> str | None:
        """A checkpoint's path for diffusers'; None when it has none."""
        if path in ALONE_BACK:
            return ALONE_BACK[path]
        if found := re.fullmatch(r"mid_block\.resnets\.([01])\.(.+)", path):
            return _joined(f"middle_block.{2 * int(found[1])}", RESNET_BACK.get(found[2]))
        if found := re.fullmatch(rf"mid_block\.attentions\.0\.({TRANSFORMER})", path):
            return f"middle_block.1.{found[1]}"
        if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", path):
            return self._block_from_diffusers(found[1], int(found[2]), found[3], int(found[4]), found[5])
        return None

    def _block_from_diffusers(self, side: str, level: int, kind: str, place: int, rest: str) -> str | None:
        first = (self.resnets + 1) * level + (side == "down")
        block = f"{'input' if side == 'down' else 'output'}_blocks"
        if (kind, place, rest) == ("downsamplers", 0, "conv") and side == "down":
            return f"{block}.{first + self.resnets}.0.op"
        if (kind, place, rest) == ("upsamplers", 0, "conv") and side == "up":
            module = 2 if self.attended is None or level in self.attended else 1
            return f"{block}.{first + self.resnets}.{module}.conv"
        if place > self.resnets - (side == "down"):
            return None
        if kind == "resnets":
            return _joined(f"{block}.{first + place}.0", RESNET_BACK.get(rest))
        if kind == "attentions" and re.fullmatch(TRANSFORMER, rest):
            return f"{block}.{first + place}.1.{rest}"
        return None


def unet_of(paths: Iterable[str]) -> UNet:
    """The U-Net that these paths, in either form, belong to.

    R is 2 unless that cannot be: a checkpoint's number would have no place, or diffusers' places are whole without it.
    """
    paths = list(paths)
    if any(re.match(r"(down|mid|up)_blocks?\.", path) for path in paths):
        attended = {int(found[1]) for path in paths if (found := re.match(r"up_blocks\.(\d+)\.attentions\.", path))}
        return UNet(_resnets_by_places(paths), frozenset(attended) or None)
    layers = [path for path in paths if re.match(r"(input|output)_blocks\.", path)]
    fits = (n for n in (USUAL_RESNETS, 1, 3, 4) if all(UNet(n).to_diffusers(path) for path in layers))
    return UNet(next(fits, USUAL_RESNETS))


def _resnets_by_places(paths: list[str]) -> int:
    """R by diffusers' places: each level down has R of them with attention, each level up R + 1."""
    places: dict[tuple[str, int], set[int]] = defaultdict(set)
    for path in paths:
        if found := re.match(r"(down|up)_blocks\.(\d+)\.(?:resnets|attentions)\.(\d+)\.", path):
            places[found[1], int(found[2])].add(int(found[3]))
    most = max((max(found) + (side == "down") for (side, _), found in places.items()), default=USUAL_RESNETS)
    if most > USUAL_RESNETS:
        return most
    down, up = ([found for (way, _), found in places.items() if way == side] for side in ("down", "up"))
    whole = all(found == {0} for found in down) and all(found == {0, 1} for found in up)
    return 1 if whole and down and len(down) == len(up) else USUAL_RESNETS


def _joined(block: str, layer: str | None) -> str | None:
    return f"{block}.{layer}" if layer else None
