"""diffusers' networks at full size, of which only names and shapes are asked."""

import torch


def without_memory(build):
    """What `build` makes, with shapes and no values."""
    with torch.device("meta"):
        return build()


def network(kind):
    """diffusers' network of SDXL ("sdxl"), SD 1.5 ("sd15") or FLUX ("flux"), without memory."""
    import diffusers

    if kind == "flux":
        return without_memory(lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True))
    if kind == "sd15":
        return without_memory(lambda: diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768))
    return without_memory(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )
    )
