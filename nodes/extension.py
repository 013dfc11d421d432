"""The nodes, in the order in which a user meets them."""

from comfy_api.latest import ComfyExtension, io

from .auto_captioner import LoraWorkbenchAutoCaptioner
from .checkpoint_picker import LoraWorkbenchCheckpointPicker
from .convert_lora import LoraWorkbenchConvertLora
from .dataset_loader import LoraWorkbenchDatasetLoader
from .extract_lora import LoraWorkbenchExtractLora
from .host import routes
from .inspect_lora import LoraWorkbenchInspectLora
from .merge_loras import LoraWorkbenchMergeLoras
from .regularization_images import LoraWorkbenchRegularizationImages
from .resize_lora import LoraWorkbenchResizeLora
from .stack_apply import LoraWorkbenchStackApply
from .trainer import LoraWorkbenchTrainer
from .training_settings import LoraWorkbenchTrainingSettings

NODES = (
    LoraWorkbenchDatasetLoader,
    LoraWorkbenchAutoCaptioner,
    LoraWorkbenchTrainer,
    LoraWorkbenchTrainingSettings,
    LoraWorkbenchCheckpointPicker,
    LoraWorkbenchStackApply,
    LoraWorkbenchRegularizationImages,
    LoraWorkbenchConvertLora,
    LoraWorkbenchInspectLora,
    LoraWorkbenchMergeLoras,
    LoraWorkbenchExtractLora,
    LoraWorkbenchResizeLora,
)


class LoraWorkbench(ComfyExtension):
    """What ComfyUI asks the pack for."""

    async def on_load(self) -> None:
        """Open the routes of the Trainer's panel and the caption review."""
        routes.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node of the pack."""
        return list(NODES)
